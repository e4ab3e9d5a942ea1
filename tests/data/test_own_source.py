"""Sources of a person's own: what they give is prepared, found again while nothing has changed, and blamed by line."""

import sys
from pathlib import Path

import pytest

from k2train.config import ConfigError, DataConfig
from k2train.data import DataError, open_dataset, prepare
from k2train.data.preparation.pipeline import find_prepared
from tests.data.conftest import WORDS, ignore_progress

CODE = """
from pathlib import Path

class Entries:
    def __init__(self, folder, ending=".log", spoilt=None):
        self.folder, self.ending, self.spoilt = Path(folder), ending, spoilt

    def parts(self):
        return [str(path) for path in self.folder.glob(f"*{self.ending}")]

    def read(self, part):
        for entry in Path(part).read_text().split("----\\n"):
            service, _, text = entry.partition(": ")
            if self.spoilt == "row":
                yield text
            if self.spoilt == "column":
                yield {"txt": text}
            if self.spoilt == "error":
                1 / 0  # line 19
            yield {"service": service, "text": text}

class Nothing(Entries):
    def parts(self):
        return []

class NoSource:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of a module with sources, and of what they read."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_sources", raising=False)
    (tmp_path / "own_sources.py").write_text(CODE)
    for number in range(3):
        entries = [f"{word}: {f'{word} {other} {number}' * 9}\n" for word in WORDS for other in WORDS]
        (tmp_path / f"{number}.log").write_text("----\n".join(entries))
    return tmp_path


@pytest.fixture
def config(own, make_config):
    def make(kind: str = "own_sources.Entries", workers: int = 1, **keys) -> DataConfig:
        options = {"folder": str(own)} | keys.pop("options", {})
        sources = {"mine": {"kind": kind, "options": options} | keys}
        return make_config(sources=sources, path=None, workers=workers)

    return make


def made(config: DataConfig, cache: Path) -> Path:
    return prepare(config, cache=cache, progress=ignore_progress)


def test_its_documents_are_prepared_as_those_of_any_table(config, tmp_path):
    manifest = made(config(group="service", text="{service}> {text}", reject=["alpha"]), tmp_path / "cache")
    dataset = open_dataset(manifest)
    texts = {split: [text.decode() for _, text in dataset.documents(split)] for split in ("train", "held_out")}
    assert len(texts["train"]) + len(texts["held_out"]) == 3 * (len(WORDS) - 1) ** 2
    services = {split: {text.partition("> ")[0] for text in found} for split, found in texts.items()}
    assert services["held_out"]
    assert not services["train"] & services["held_out"]  # held out as a whole
    assert "own_sources.Entries, file " in dataset.manifest["about"]["sources"]["mine"]


def test_workers_find_the_class_too_and_make_the_same(config, tmp_path):
    manifests = [made(config(workers=number), tmp_path / f"cache{number}") for number in (1, 2)]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()


def test_it_is_prepared_anew_when_and_only_when_something_has_changed(config, own, tmp_path):
    cache = tmp_path / "cache"
    first = made(config(), cache)
    assert find_prepared(config(), cache=cache) == first
    assert find_prepared(config(options={"ending": "1.log"}), cache=cache) is None
    with (own / "own_sources.py").open("a") as file:
        file.write("# a change\n")
    assert find_prepared(config(), cache=cache) is None
    (own / "own_sources.py").write_text(CODE)
    assert find_prepared(config(), cache=cache) == first
    (own / "0.log").write_text("alpha: other\n")
    assert find_prepared(config(), cache=cache) is None


@pytest.mark.parametrize(
    ("keys", "error", "why"),
    [
        ({"kind": "own_sourcs.Entries"}, ConfigError, "kind=own_sourcs.Entries: there is no module own_sourcs: start"),
        ({"kind": "own_sources.Entrys"}, ConfigError, "has no Entrys: did you mean 'Entries'"),
        ({"kind": "own_sources.NoSource"}, ConfigError, r"data.sources.mine.kind=.* is no k2train.*\.Source"),
        ({"options": {"endng": ".txt"}}, ConfigError, "data.sources.mine.options.endng: did you mean 'ending'"),
        ({"options": {"folder": 5}}, ConfigError, "cannot be constructed: TypeError: .*own_sources.py, line 6"),
        ({"kind": "own_sources.Nothing"}, DataError, r"own_sources.Nothing.parts\(\) gives none"),
        ({"options": {"spoilt": "row"}}, DataError, r"Entries.read\('.*0.log'\) gives str: it must give mappings"),
        ({"options": {"spoilt": "column"}}, DataError, "has no column 'text': it has 'txt'"),
        ({"options": {"spoilt": "error"}}, DataError, r"ZeroDivisionError: .* \(.*own_sources.py, line 19\)"),
    ],
)
def test_what_is_wrong_with_it_is_told(config, tmp_path, keys, error, why):
    with pytest.raises(error, match=why) as caught:
        made(config(**keys), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_keys_that_it_would_not_read_are_refused(config):
    for keys, why in (({"path": "logs"}, "does not read it"), ({"include": ["*"]}, "finds its parts itself")):
        with pytest.raises(ConfigError, match=why):
            config(**keys)
    with pytest.raises(ConfigError, match="options is given but kind=folder is not your own"):
        config(kind="folder", path=".")


def test_a_module_that_cannot_be_imported_is_blamed_by_line(own, config, tmp_path):
    for code, why in (("import k2train\nx = (\n", "SyntaxError: .*line 2"), ("\nimport nowhere\n", "nowhere.*line 2")):
        (own / "own_broken.py").write_text(code)
        sys.modules.pop("own_broken", None)
        with pytest.raises(ConfigError, match=f"own_broken cannot be imported: .*{why}"):
            made(config(kind="own_broken.Entries"), tmp_path / "cache")
