import itertools
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from k2train.data import DataError, DataPhase, Dataset, TrainStream, open_dataset, prepare
from k2train.data.order import positions


def stream_of(dataset: Dataset, length: int, *, seed: int) -> TrainStream:
    return TrainStream(dataset, [DataPhase(1000, length)], seed=seed)


@pytest.fixture
def stream(dataset: Dataset) -> TrainStream:
    return stream_of(dataset, 32, seed=5)


def test_an_epoch_predicts_each_token_once(dataset: Dataset, stream: TrainStream):
    tokens = dataset.stream("train").read(0, dataset.tokens("train"))
    assert stream.windows == (len(tokens) - 1) // 32
    windows = positions(range(stream.windows), windows=stream.windows, seed=5)
    labels = np.empty(32 * stream.windows, dtype=np.int64)
    for number, window in enumerate(windows):
        sample = stream.sample(number)
        assert sample.shape == (33,)
        assert np.array_equal(sample, tokens[window * 32 : window * 32 + 33])
        labels[window * 32 : window * 32 + 32] = sample[1:]
    assert np.array_equal(labels, tokens[1 : 1 + len(labels)])


def test_a_batch_is_its_samples(stream: TrainStream):
    numbers = [3, 0, 10**6, 3]
    tokens, labels, _ = stream.batch(numbers)
    assert tokens.shape == labels.shape == (4, 32)
    assert tokens.dtype == labels.dtype == torch.int64
    for row, number in enumerate(numbers):
        assert tokens[row].tolist() == stream.sample(number)[:-1].tolist()
        assert labels[row].tolist() == stream.sample(number)[1:].tolist()


def test_however_samples_are_shared_out_they_are_the_same(stream: TrainStream):
    whole, *_ = stream.batch(range(48))
    for ranks, micro in itertools.product((1, 2, 4), (1, 3)):
        pieces = {}
        for rank in range(ranks):
            mine = range(48 * rank // ranks, 48 * (rank + 1) // ranks)
            for start in range(0, len(mine), micro):
                for number, row in zip(
                    mine[start : start + micro], stream.batch(mine[start : start + micro])[0], strict=True
                ):
                    pieces[number] = row
        assert torch.equal(torch.stack([pieces[number] for number in range(48)]), whole)


def test_seeds_differ_and_epochs_differ(dataset: Dataset, stream: TrainStream):
    other = stream_of(dataset, 32, seed=6)
    numbers = range(20)
    assert not torch.equal(stream.batch(numbers)[0], other.batch(numbers)[0])
    later = [number + stream.windows for number in numbers]
    assert not torch.equal(stream.batch(numbers)[0], stream.batch(later)[0])


def test_trace_names_the_documents_of_a_sample(dataset: Dataset):
    stream = stream_of(dataset, 700, seed=1)
    end = dataset.tokenizer.end_of_text
    texts = dict(dataset.documents("train"))
    ids = {origin: [*dataset.tokenizer.encode(text.decode()), end] for origin, text in texts.items()}
    pieces = 0
    for number in range(stream.windows):
        spans = stream.trace(number).spans
        pieces += len(spans)
        traced = [token for span in spans for token in ids[span.origin][span.start : span.stop]]
        assert traced == stream.sample(number).tolist()
    assert pieces > stream.windows  # samples of several documents were among them


def test_a_trace_that_begins_at_a_document_begins_with_it(dataset: Dataset):
    stream = dataset.stream("train")
    start = 0
    for origin, tokens in stream.documents():
        stop = start + len(tokens) + 1
        (span,) = stream.spans(start, stop)
        assert (span.origin, span.start, span.stop) == (origin, 0, len(tokens) + 1)
        (span,) = stream.spans(stop - 1, stop)  # its end_of_text
        assert (span.origin, span.start, span.stop) == (origin, len(tokens), len(tokens) + 1)
        start = stop
    assert start == len(stream)


def test_steps_read_ahead_are_their_batches(stream: TrainStream):
    plan = [[range(start, start + 4), range(start + 4, start + 8)][: 1 + start % 3] for start in range(0, 80, 8)]
    for found, parts in zip(stream.steps(plan), plan, strict=True):
        for batch, numbers in zip(found, parts, strict=True):
            assert all(map(torch.equal, batch, stream.batch(numbers)))


def test_reading_ahead_ends_with_its_reader(stream: TrainStream):
    endless = stream.steps([[number]] for number in itertools.count())
    for _ in range(3):
        next(endless)
    assert any(thread.name == "k2train-prefetch" for thread in threading.enumerate())
    endless.close()
    assert not any(thread.name == "k2train-prefetch" for thread in threading.enumerate())


def test_an_error_while_reading_ahead_reaches_the_reader(stream: TrainStream):
    steps = stream.steps([[[0]], [[1], [-1]], [[1]]])
    next(steps)
    with pytest.raises(ValueError, match="sample number -1 is negative"):
        next(steps)


def test_a_split_smaller_than_a_sample_is_refused(dataset: Dataset):
    tokens = dataset.tokens("train")
    assert stream_of(dataset, tokens - 1, seed=0).windows == 1
    with pytest.raises(DataError, match=f"has {tokens} tokens and a sample takes {tokens + 1} .*add text, or lower"):
        stream_of(dataset, tokens, seed=0)


def test_shards_are_one_stream(dataset: Dataset, tmp_path: Path, make_config, monkeypatch):
    path = prepare(make_config(shard_bytes=3000), cache=tmp_path / "other", progress=lambda *_: None)
    assert len(list(path.parent.glob("folder/train-*.safetensors"))) > 3
    cut = open_dataset(path)
    assert list(cut.documents("train")) == list(dataset.documents("train"))
    one, other = (stream_of(each, 900, seed=2) for each in (dataset, cut))
    for number in range(one.windows):
        assert np.array_equal(one.sample(number), other.sample(number))
        for span, same in zip(one.trace(number).spans, other.trace(number).spans, strict=True):
            assert replace(span, shard="") == replace(same, shard="")
