import errno
import os
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from k2train.config import DataConfig, parse
from k2train.data.errors import DataError
from k2train.data.sources import Corpus, Skip, find_corpus, located
from k2train.data.sources.files import read_text
from k2train.paths import config_dir


def listed(config: DataConfig, cache: Path = Path("/nowhere")) -> Corpus:
    ((name, source),) = located(config).items()
    return find_corpus(source, name, apart_from=cache)


def origins(found: Corpus) -> list[str]:
    return [file.origin for file in found.files]


def stdlib_config() -> DataConfig:
    return parse(DataConfig, yaml.safe_load((config_dir() / "data" / "stdlib.yaml").read_text()))


def test_stdlib_is_the_running_interpreters_without_tests_and_tables():
    found = listed(stdlib_config())
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= set(origins(found))
    assert found.root == str(Path(os.__file__).resolve().parent)
    assert sum(file.size for file in found.files) > 5_000_000
    for origin in origins(found):
        assert origin.endswith(".py")
        folders = origin.split("/")[:-1]
        assert not {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__"} & {
            *folders
        }
        assert not origin.startswith("_sysconfigdata")
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in found.title
    assert found == listed(stdlib_config())


def test_an_interpreter_without_library_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "gone"))
    with pytest.raises(DataError, match="gone, which is missing"):
        listed(stdlib_config())
    (tmp_path / "gone").mkdir()
    with pytest.raises(DataError, match=r"no file in .*gone matches"):
        listed(stdlib_config())


def test_listing_is_sorted_and_follows_the_patterns(corpus, make_config):
    for name in (".hidden.txt", ".git/config.txt", "folder0/.cache/x.txt", "runs/a/log.txt", "a/node_modules/m.txt"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text("excluded")
    found = origins(listed(make_config()))
    assert found == sorted(found)
    assert len(found) == 12
    assert origins(listed(make_config(source={"include": ["folder1/*"]}))) == [
        f"folder1/deep{n}.txt" for n in (1, 3, 5)
    ]
    assert origins(listed(make_config(source={"exclude": ["top*", "folder0/*", ".*", "*/.*", "runs/*", "a/*"]}))) == [
        f"folder1/deep{n}.txt" for n in (1, 3, 5)
    ]


def test_the_cache_inside_the_folder_is_not_read(corpus, make_config):
    (corpus / "cache").mkdir()
    (corpus / "cache" / "tokenizer.json").write_text("{}")
    assert len(listed(make_config()).files) == 13
    assert len(listed(make_config(), cache=corpus / "cache").files) == 12


def test_missing_and_unfit_folders_are_named(tmp_path, make_config):
    with pytest.raises(DataError, match="corpus does not exist"):
        listed(make_config())
    (tmp_path / "corpus").write_text("a file")
    assert origins(listed(make_config())) == ["corpus"]  # a file is a corpus of one
    (tmp_path / "corpus").unlink()
    (tmp_path / "corpus").mkdir()
    with pytest.raises(DataError, match=r"no file in .*corpus matches"):
        listed(make_config())


def test_links_and_pipes(corpus, make_config):
    (corpus / "link.txt").symlink_to(corpus / "top0.txt")
    (corpus / "folder0" / "up").symlink_to(corpus)  # a circle
    (corpus / "self").symlink_to(corpus / "self")
    (corpus / "broken").symlink_to(corpus / "nowhere")
    os.mkfifo(corpus / "pipe")  # opening it would wait for ever
    found = listed(make_config())
    assert len(found.files) == 13
    assert "link.txt" in origins(found)
    assert found.skipped == {Skip.FOLDER_LINK: 1, Skip.UNREADABLE: 2, Skip.NOT_A_FILE: 1}


def test_a_folder_without_permission_is_counted_and_other_failures_stop(corpus, make_config, monkeypatch):
    scandir = os.scandir
    code = errno.EACCES

    def refuse(folder):
        if str(folder).endswith("folder1"):
            raise OSError(code, os.strerror(code), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    found = listed(make_config())
    assert len(found.files) == 9
    assert found.skipped == {Skip.UNREADABLE: 1}
    code = errno.EIO
    with pytest.raises(DataError, match="folder1"):
        listed(make_config())


def test_a_root_without_permission_is_an_error(corpus, make_config, monkeypatch):
    def refuse(folder):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=str(corpus)):
        listed(make_config())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", ""),
        (b"a\0b", Skip.BINARY),
        ("naïve".encode("latin-1"), Skip.NOT_UTF8),
        (b"\xed\xa0\x80", Skip.NOT_UTF8),  # a lone surrogate
        (b"\xef\xbb\xbfa\r\nb\r", "\ufeffa\r\nb\r"),  # nothing is tidied up
    ],
)
def test_reading(tmp_path, data, expected):
    path = tmp_path / "file"
    path.write_bytes(data)
    assert read_text(str(path)) == expected


def test_reading_what_has_gone(tmp_path):
    assert read_text(str(tmp_path / "gone")) is Skip.UNREADABLE


def test_a_file_name_that_is_no_text_still_has_an_origin(corpus, make_config):
    try:
        Path(os.fsdecode(bytes(corpus) + b"/odd\xff.txt")).write_text("text")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert "odd\\udcff.txt" in origins(listed(make_config()))
