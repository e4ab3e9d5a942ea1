"""Packing: each token once, no document cut that fits, nearly full windows, fast, and left beside the shards."""

from time import process_time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_data import documents_of, make_dataset

from k2train.data import DataPhase, TrainStream, open_dataset
from k2train.data.dataset import IGNORED
from k2train.data.packing import pack
from k2train.data.windows import packings_of


def pieces(packing):
    return [list(zip(*(part.tolist() for part in packing.window(w)), strict=True)) for w in range(len(packing))]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 40))
def test_each_token_once_and_only_long_documents_are_cut(lengths, window):
    packing = pack(np.array(lengths, dtype=np.int64), sequence_length=window)
    found = [piece for pieces_of in pieces(packing) for piece in pieces_of]
    covered = sorted(position for start, length in found for position in range(start, start + length))
    assert covered == list(range(sum(lengths)))
    assert all(sum(length for _, length in pieces_of) <= window for pieces_of in pieces(packing))
    ends = np.cumsum(lengths)
    for start, length in found:
        document = int(np.searchsorted(ends, start, side="right"))
        assert start + length <= ends[document]
        if lengths[document] <= window:
            assert length == lengths[document]


def slow_best_fit(lengths, window):
    """An oracle: one piece at a time, into the fullest window with room for it."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= length]
        if fits:
            rooms.remove(min(fits))
            rooms.append(min(fits) - length)
        else:
            rooms.append(window - length)
    return sorted(rooms)


@given(st.lists(st.integers(1, 20), max_size=80))
def test_it_is_best_fit_decreasing(lengths):
    packing = pack(np.array(lengths, dtype=np.int64), sequence_length=20)
    rooms = sorted(20 - sum(length for _, length in pieces_of) for pieces_of in pieces(packing))
    assert rooms == slow_best_fit(lengths, 20)


def test_a_million_documents_fill_their_windows_in_seconds():
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(6.5, 1.3, 10**6).astype(np.int64))
    begin = process_time()
    packing = pack(lengths, sequence_length=2048)
    assert process_time() - begin < 20
    assert lengths.sum() / (len(packing) * 2048) > 0.999


@pytest.mark.parametrize("group_shards", [None, 2])
def test_packed_samples_predict_each_token_once_from_its_own_document(tmp_path, group_shards):
    documents = documents_of(57, seed=3)
    dataset = open_dataset(make_dataset(tmp_path, {"one": documents}))
    stream = TrainStream(dataset, [DataPhase(1000, 32)], seed=1, packing=True, group_shards=group_shards)
    tokens, labels, starts = stream.batch(range(stream.windows))
    text = np.concatenate(documents)
    position = {origin: np.cumsum([0, *map(len, documents)])[n] for n in range(57) for origin in [f"one/{n}"]}
    seen = np.zeros(len(text), dtype=int)
    for row in range(stream.windows):
        trace, at = stream.trace(row), 0
        for span in trace.spans:
            first, length = int(position[span.origin]) + span.start, span.stop - span.start
            seen[first : first + length] += 1
            assert labels[row, at : at + length].tolist() == text[first : first + length].tolist()
            before = [0, *text.tolist()][first : first + length]
            assert tokens[row, at : at + length].tolist() == before
            assert set(starts[row, at : at + length].tolist()) == {at}
            at += length
        assert set(labels[row, at:].tolist()) <= {IGNORED}
        assert (tokens[row, at:] == 0).all()
    assert (seen == 1).all()


def test_a_packing_is_kept_beside_the_shards_and_made_anew_if_it_is_damaged(tmp_path, monkeypatch):
    dataset = open_dataset(make_dataset(tmp_path, {"one": documents_of(30, seed=3)}))
    stream, folder = dataset.stream("train", "one"), dataset.folder / "one"
    settings = {"sequence_length": 16, "group_shards": None, "fingerprint": dataset.fingerprint}
    (made,) = packings_of(stream, folder, **settings)
    path = folder / "packed-16-all.safetensors"
    good = path.read_bytes()
    monkeypatch.setattr(stream, "document_ends", lambda: pytest.fail("it was worked out again"))
    (again,) = packings_of(stream, folder, **settings)
    assert pieces(again) == pieces(made)
    monkeypatch.undo()
    for bad in (good[:-3] + bytes([good[-3] ^ 1]) + good[-2:], good[:50], b""):
        path.write_bytes(bad)
        assert pieces(packings_of(stream, folder, **settings)[0]) == pieces(made)
        assert path.read_bytes() == good
    other = packings_of(stream, folder, **settings | {"fingerprint": "of other data"})
    assert pieces(other[0]) == pieces(made)
    assert path.read_bytes() != good
