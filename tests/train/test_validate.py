"""The sets that a run is validated on, and what they are together."""

import pytest
from synthetic_data import documents_of, make_dataset

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import ConfigError, DataConfig, RunConfig, parse
from k2train.data import open_dataset, prepare
from k2train.train.errors import RunError
from k2train.train.validate import HeldOutLoss, held_out_sets, joined


def make(folder, *, vocabulary=300, sources=("one", "two"), own=()):
    """The manifest of a data set with a text or two in each source."""
    for name in sources:
        for number in range(4):
            path = folder / "text" / name / str(number) / "text.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name} {number} " * 60 * (1 + number))
    words = ["data=mixture", "data.cache_dir=null", "data.held_out=0.3", "data.workers=1"]
    words += [f"data.tokenizer.vocab_size={vocabulary}", *own]
    data = compose(TRAIN, words)["data"]
    plain = {"kind": "folder", "include": ["*"], "exclude": []}
    data |= {"weights": {}, "sources": {name: plain | {"path": str(folder / "text" / name)} for name in sources}}
    return prepare(parse(DataConfig, data), cache=folder / "cache", progress=lambda *_: None)


def test_a_set_for_each_source_and_those_prepared_apart(tmp_path):
    dataset = open_dataset(make(tmp_path / "a"))
    definition = dataset.folder / dataset.manifest["tokenizer"]["file"]
    same = ("data.tokenizer.kind=json", f"data.tokenizer.path={definition}")
    apart = make(tmp_path / "b", sources=("other",), own=same)
    sets = held_out_sets(dataset, {"elsewhere": apart}, sequence_length=16)
    assert [(name, found.own) for name, found in sets.items()] == [("one", True), ("two", True), ("elsewhere", False)]
    for name, found in sets.items():
        assert sum(int((labels >= 0).sum()) for _, labels, _ in found.windows) == found.tokens > 0, name
    assert sets["one"].tokens + sets["two"].tokens == dataset.tokens("held_out")
    assert sets["elsewhere"].tokens == open_dataset(apart).tokens("held_out")

    with pytest.raises(RunError, match=r"validate.data.two=.* has the name of a source"):
        held_out_sets(dataset, {"two": apart}, sequence_length=16)
    other = make(tmp_path / "c", vocabulary=260)
    with pytest.raises(RunError) as refused:
        held_out_sets(dataset, {"c": other}, sequence_length=16)
    for each in (dataset, open_dataset(other)):
        assert each.manifest["tokenizer"]["sha256"] in str(refused.value)
    assert f"data.tokenizer.path={definition}" in str(refused.value)


def test_a_source_without_held_out_text_is_no_set(tmp_path):
    manifest = make_dataset(tmp_path / "a", {"a": documents_of(5, seed=0)})
    dataset = open_dataset(manifest)
    assert held_out_sets(dataset, {}, sequence_length=16) == {}
    with pytest.raises(RunError, match="has no held-out text"):
        held_out_sets(dataset, {"b": manifest}, sequence_length=16)


def test_a_few_windows_stand_for_all_of_their_set():
    large, small = HeldOutLoss(nats=20, tokens=10, bytes=30), HeldOutLoss(nats=10, tokens=10, bytes=10)
    total = joined([(large, 90), (small, 10)])
    assert (total.tokens, total.bytes) == (100, 280)
    assert total.per_token == pytest.approx((90 * 2 + 10 * 1) / 100)
    whole = HeldOutLoss(nats=0.1, tokens=3, bytes=7)
    assert joined([(whole, 3)]) == whole  # to the last bit


def test_a_name_that_no_metric_can_have():
    config = compose(TRAIN, ["validate.data={wiki: /data/wiki}"])
    assert parse(RunConfig, config).validate.data == {"wiki": "/data/wiki"}
    config["validate"]["data"] = {"a/b": "x"}
    with pytest.raises(ConfigError, match=r"validate.data.a/b: the name becomes a metric's"):
        parse(RunConfig, config)
