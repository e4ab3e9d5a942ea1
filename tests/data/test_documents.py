"""Where documents begin in a window comes from the shards, whatever the tokens are."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from k2train.data import DataPhase, Dataset, TrainStream
from k2train.data.dataset import TokenStream, Windows
from k2train.data.order import positions
from k2train.data.reader import Folder

# Tokens of each document, its end included, of two shards: longer than any window below, and of a single token.
SHARDS = ((3, 41, 1, 1, 5, 8), (2, 30, 9))
TOKENS = sum(map(sum, SHARDS))
END = 7


class Shard:
    def __init__(self, tokens: np.ndarray, document_ends: np.ndarray) -> None:
        self.tokens, self.document_ends = tokens, document_ends

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, first: int, last: int) -> np.ndarray:
        return self.tokens[first:last]


class FakeShards(list):
    @property
    def tokens(self) -> list[int]:
        return [len(shard) for shard in self]


def stream_of(tokens: np.ndarray) -> TokenStream:
    shards, start = [], 0
    for lengths in SHARDS:
        stop = start + sum(lengths)
        shards.append(Shard(tokens[start:stop], np.cumsum(lengths)))
        start = stop
    return TokenStream(FakeShards(shards))


def boundary_before() -> list[int]:
    """For each token of the stream, the last token not after it that closes a document; -1: there is none."""
    closing = set((np.cumsum(list(itertools.chain(*SHARDS))) - 1).tolist())
    found, last = [], -1
    for position in range(TOKENS):
        last = position if position in closing else last
        found.append(last)
    return found


@pytest.fixture(params=["closed", "no end of text anywhere", "end of text everywhere"])
def stream(request: pytest.FixtureRequest) -> TokenStream:
    """The same documents, each closed by end_of_text or not at all, or of nothing else."""
    if request.param == "end of text everywhere":
        return stream_of(np.full(TOKENS, END, dtype=np.uint16))
    tokens = np.arange(TOKENS, dtype=np.uint16) + 100
    if request.param == "closed":
        tokens[np.cumsum(list(itertools.chain(*SHARDS))) - 1] = END
    return stream_of(tokens)


@pytest.mark.parametrize("length", [1, 7, 16, TOKENS - 1])
def test_starts_of_training_samples(stream: TokenStream, length: int):
    dataset = SimpleNamespace(
        stream=lambda split, source: stream,
        tokens=lambda split, source: len(stream),
        numbered=lambda source: 0,
        sources=("only",),
        files=Folder(Path()),
    )
    samples = TrainStream(dataset, [DataPhase(100, length)], seed=3)
    numbers = range(samples.windows)
    tokens, labels, starts = samples.batch(numbers)
    assert starts.shape == tokens.shape == labels.shape
    assert starts.dtype == torch.int64
    before, middle = boundary_before(), 0
    for row, window in enumerate(positions(numbers, windows=samples.windows, seed=3).tolist()):
        first = window * length
        assert starts[row].tolist() == [max(before[first + i] - first, 0) for i in range(length)]
        middle += before[first] != first
    assert middle > 0 or length == 1  # windows that begin inside a document were among them


@pytest.mark.parametrize("length", [1, 7, 16, 1000])
def test_starts_of_held_out_windows(stream: TokenStream, length: int):
    """Its inputs are end_of_text, the stream's tokens but the last, and filling, which belongs to the last document."""
    before = [0, *(position + 1 for position in boundary_before())]
    for number, (_, labels, starts) in enumerate(Windows(stream, sequence_length=length, end_of_text=END)):
        predicted = int((labels >= 0).sum())
        first = number * length
        expected = [max(before[first + i] - first, 0) for i in range(predicted)]
        assert starts[:predicted].tolist() == expected
        assert (starts <= torch.arange(length)).all()


def test_a_documents_tokens_have_one_start(dataset: Dataset):
    """On prepared text: a document's first token is predicted from the end of the one before it alone."""
    samples = TrainStream(dataset, [DataPhase(1, dataset.tokens("train") - 1)], seed=0)
    (tokens,), _, (starts,) = samples.batch([0])
    begin = 0
    for number, (_, ids) in enumerate(dataset.stream("train").documents()):
        own = starts[begin : begin + len(ids)]
        assert own.unique().tolist() == [max(begin - 1, 0)], number
        if begin:
            assert tokens[begin - 1] == dataset.tokenizer.end_of_text
        begin += len(ids) + 1
