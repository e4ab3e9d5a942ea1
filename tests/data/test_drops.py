"""Documents that are dropped are predicted no more from a sample on; nothing else changes."""

import re
from functools import cache

import pytest
import torch
from synthetic_data import documents_of, make_dataset

from k2train.config import DropConfig
from k2train.data import DataError, DataPhase, TrainStream, open_dataset
from k2train.data.dataset import IGNORED
from k2train.data.trace import describe_trace

# Of bytes, which each tokenizer knows.
SOURCES = {
    name: [document % 250 for document in documents_of(number, seed=number)]
    for name, number in (("code", 60), ("web", 50))
}
DROPPED = {"code": (3, 17, 18), "web": (9,)}
NAMES = tuple(f"{source}/{number}" for source, numbers in DROPPED.items() for number in numbers)
opened = cache(open_dataset)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("sources"), SOURCES, per_shard=20)


def stream_of(manifest, *drops: DropConfig, packing: bool = False) -> TrainStream:
    return TrainStream(opened(manifest), [DataPhase(400, 48)], seed=3, packing=packing, drops=drops)


def drop(first: int, *documents: str, file: str | None = None) -> DropConfig:
    return DropConfig(from_sample=first, documents=documents, file=file)


@pytest.mark.parametrize("packing", [False, True], ids=["cut", "packed"])
def test_the_labels_of_dropped_documents_are_left_out_and_nothing_else_changes(manifest, packing):
    whole, dropping = stream_of(manifest, packing=packing), stream_of(manifest, drop(100, *NAMES), packing=packing)
    gone = 0
    for number in range(0, 400, 4):
        before, after = (stream.batch(range(number, number + 4)) for stream in (whole, dropping))
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[2], after[2])
        if number < 100:
            assert torch.equal(before[1], after[1])
            continue
        for row in range(4):
            trace = whole.trace(number + row)
            owners = [span.document for span in trace.spans for _ in range(span.start, span.stop)]
            owners = owners if packing else owners[1:]  # of the labels
            owners += [-1] * (48 - len(owners))
            expected = [
                IGNORED if owner in DROPPED[trace.source] else label
                for owner, label in zip(owners, before[1][row].tolist(), strict=True)
            ]
            assert after[1][row].tolist() == expected
            gone += sum(owner in DROPPED[trace.source] for owner in owners)
    assert gone > 200
    assert whole.tokens_seen(400) == dropping.tokens_seen(400)  # they are read


def test_a_list_in_a_file_and_several_entries_come_to_the_same(manifest, tmp_path):
    path = tmp_path / "documents.txt"
    path.write_text("\n".join(NAMES[1:]) + "\n")
    one, other = stream_of(manifest, drop(7, *NAMES)), stream_of(manifest, drop(7, file=str(path)), drop(7, NAMES[0]))
    for number in range(0, 60, 4):
        assert torch.equal(one.batch(range(number, number + 4))[1], other.batch(range(number, number + 4))[1])


def test_a_trace_shows_the_text_and_that_it_was_dropped(manifest):
    whole, dropping = stream_of(manifest), stream_of(manifest, drop(100, *NAMES))
    found = set()
    for number in range(60, 400):
        lines = list(describe_trace(dropping.trace(number), dropping.dataset.tokenizer))
        plain = list(describe_trace(whole.trace(number), whole.dataset.tokenizer))
        assert [(heading.replace(", dropped", ""), text) for heading, text in lines] == plain
        names = {name for heading, _ in lines for name in re.findall(r"\(document (\S+), dropped, in ", heading)}
        assert not names or number >= 100
        found |= names
    assert found == set(NAMES)


def test_the_past_cannot_be_changed(manifest):
    state = stream_of(manifest, drop(50, "web/1")).state_dict(200)
    resumed = stream_of(manifest, drop(50, "web/1"), drop(200, "web/2"))
    assert resumed.load_state_dict(state) == 200
    for drops in ((), (drop(50, "web/1", "web/3"),), (drop(60, "web/1"),), (drop(50, "web/1"), drop(199, "web/2"))):
        with pytest.raises(
            DataError, match=r"has dropped documents .*\[\[50, '\w{16}'\]\], now .*: from_sample .* must be 200 or more"
        ):
            stream_of(manifest, *drops).load_state_dict(state)


@pytest.mark.parametrize("name", ["books/1", "web", "web/x", "17"])
def test_what_is_no_document_is_refused(manifest, name):
    with pytest.raises(DataError, match=rf"'{name}' is no document: give source/number.*of the sources code, web"):
        stream_of(manifest, drop(0, name))


def test_a_number_that_no_document_has_is_refused(manifest):
    stream_of(manifest, drop(0, "web/49"))
    with pytest.raises(DataError, match=r"'web/50' is no document: those of web are numbered from 0 to 49"):
        stream_of(manifest, drop(0, "web/7", "web/50"))


def test_a_list_that_is_not_there_is_named(manifest, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        stream_of(manifest, drop(0, file=str(tmp_path / "nowhere.txt")))


def test_a_drop_of_nothing_is_refused():
    assert list(drop(3).check()) == [
        "documents is missing: name them, as in documents=[web/17], or give a file of such names"
    ]
