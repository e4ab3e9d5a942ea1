"""The loss of each document of a step, and their names."""

import pytest
import torch
from synthetic_data import documents_of, make_dataset

from k2train.comm import World
from k2train.data import DataPhase, TrainStream, open_dataset
from k2train.data.dataset import IGNORED
from k2train.data.trace import pieces
from k2train.train.documents import PRIOR, DocumentLosses

SOURCES = {name: documents_of(30, seed=seed) for name, seed in (("code", 1), ("web", 2))}
SOURCES = {name: [document % 250 for document in documents] for name, documents in SOURCES.items()}
WORLD = World(0, 1, 0, 1, torch.device("cpu"))
LENGTH = 48


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(make_dataset(tmp_path_factory.mktemp("sources"), SOURCES))


def test_a_bad_document_among_good_ones_is_the_worst_whatever_the_micro_batch():
    generator = torch.Generator().manual_seed(0)
    loss_BT = 3 + 0.1 * torch.randn(8, LENGTH, generator=generator)
    labels_BT = torch.zeros(8, LENGTH, dtype=torch.int64)
    starts_BT = torch.zeros_like(labels_BT)
    starts_BT[:, 20:] = 20
    loss_BT[5, 20:] = 9.0
    starts_BT[2, -2:] = LENGTH - 2
    loss_BT[2, -2:] = 12.0  # two tokens that nobody could know are no bad document
    labels_BT[7] = IGNORED  # one without any that is predicted
    loss_BT[7] = 0.0
    found = []
    for size in (8, 2):
        losses = DocumentLosses(WORLD)
        losses.begin(expected=3.0)
        for rows in zip(loss_BT.split(size), labels_BT.split(size), starts_BT.split(size), strict=True):
            losses.add(*rows)
        found.append(float(losses.worst()))
    expected = (28 * 9.0 + PRIOR * 3.0) / (28 + PRIOR)
    assert found == pytest.approx([expected, expected])


@pytest.mark.parametrize("packing", [False, True], ids=["cut", "packed"])
def test_documents_are_named_with_the_loss_of_their_own_tokens(dataset, packing):
    stream = TrainStream(dataset, [DataPhase(40, LENGTH)], seed=3, packing=packing)
    losses, parts, owned = DocumentLosses(WORLD), [range(0, 3), range(3, 6)], {}
    losses.begin(expected=0.0)
    for numbers in parts:
        _, labels_BT, starts_BT = stream.batch(numbers)
        loss_BT = torch.zeros(labels_BT.shape)
        for row, number in enumerate(numbers):
            trace = stream.trace(number)
            owners = [(trace.source, span.document) for span in trace.spans for _ in range(span.start, span.stop)]
            for place, owner in enumerate(owners if packing else owners[1:]):
                loss_BT[row, place] = 1 + owner[1] / 100  # each token tells whose it is
                owned[number, owner] = owned.get((number, owner), 0) + 1
        losses.add(loss_BT, labels_BT, starts_BT)
    told = losses.told(parts, stream, dataset.tokenizer)
    assert {(row["sample"], row["name"]): row["tokens"] for row in told} == {
        (number, f"{source}/{document}"): tokens for (number, (source, document)), tokens in owned.items()
    }
    for row in told:
        assert row["loss"] == pytest.approx(1 + int(row["name"].split("/")[1]) / 100)
        assert row["shard"].startswith(row["name"].split("/")[0])
    weighed = [row["loss"] * row["tokens"] / (row["tokens"] + PRIOR) for row in told]
    assert weighed == sorted(weighed, reverse=True)
    assert weighed[0] == pytest.approx(float(losses.worst()))
    texts = [text for _, text in pieces(stream.trace(told[0]["sample"]), dataset.tokenizer)]
    assert told[0]["text"] in texts


def test_where_sequences_are_shared_out_each_part_is_told_by_its_rank(dataset):
    stream = TrainStream(dataset, [DataPhase(40, LENGTH)], seed=3)
    numbers, found = range(0, 4), []
    _, labels_BT, starts_BT = stream.batch(numbers)
    loss_BT = torch.rand(labels_BT.shape, generator=torch.Generator().manual_seed(0))
    for first, stop in ((0, LENGTH), (0, LENGTH // 2), (LENGTH // 2, LENGTH)):
        losses = DocumentLosses(WORLD)
        losses.begin(expected=0.5)
        losses.add(loss_BT[:, first:stop], labels_BT[:, first:stop], starts_BT, first=first)
        rows = losses.told([numbers], stream, dataset.tokenizer)
        assert max(
            (row["loss"] * row["tokens"] + PRIOR * 0.5) / (row["tokens"] + PRIOR) for row in rows
        ) == pytest.approx(float(losses.worst()))
        found.append(
            {name: sum(row["loss"] * row["tokens"] for row in rows if row["name"] == name) for name in names(rows)}
        )
    whole, *parts = found
    for name, nats in whole.items():
        assert sum(part.get(name, 0.0) for part in parts) == pytest.approx(nats)


def names(rows):
    return {row["name"] for row in rows}
