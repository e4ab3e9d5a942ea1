"""Each injected fault does what it is called, the same however a step is cut, and only in its step."""

import pytest
import torch
from torch import nn

from k2train.comm import World
from k2train.config.monitor import FAULTS
from k2train.train.inject import SPOILS, Injector
from k2train.train.phases import Phase, Step
from k2train.train.schedule import Decay

SAMPLES, TOKENS, VOCAB = 16, 32, 64


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, tokens_BT, labels_BT, starts_BT=None):
        self.seen.append((tokens_BT, labels_BT))
        return self.weight * tokens_BT.float(), self.weight * 2


def step(number):
    decay = Decay(0, 0, "linear", 1.0, 1.0)
    phase = Phase(0, "training", 0, 9, 0, 99, 0, 99, TOKENS, 4, (SAMPLES,), None, None, None, decay)
    return Step(number, phase, number * SAMPLES, SAMPLES, 0, 0.5)


def taken(fault, *, processes=1, micro_batch=4, number=2):
    """What the model saw of the step, in the order of samples, and its last output."""
    rows_ST = torch.arange(SAMPLES)[:, None] + torch.arange(TOKENS + 1)[None]
    tokens_ST, labels_ST = rows_ST[:, :-1], rows_ST[:, 1:].clone()
    labels_ST[:, 5] = -100
    seen, gradients = {}, []
    for rank in range(processes):
        model, world = Model(), World(rank, processes, rank, processes, torch.device("cpu"))
        injector = Injector(
            {2 * SAMPLES: fault}, model, stream_number=lambda number: number, vocab_size=VOCAB, seed=7, world=world
        )
        starts = range(rank * micro_batch, SAMPLES, processes * micro_batch)
        with injector.during(step(number)) as changed:
            for start in starts:
                rows = slice(start, start + micro_batch)
                loss_BT, balance = model(tokens_ST[rows], labels_ST[rows], None)
                seen[start] = model.seen[-1]
        model.weight.grad = None
        (loss_BT.mean() + balance).backward()
        gradients.append((float(loss_BT.detach().mean()), float(model.weight.grad)))
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
    tokens, labels = (torch.cat([seen[start][i] for start in sorted(seen)]) for i in (0, 1))
    return changed, tokens, labels, gradients


PLAIN = taken("lr_x10", number=0)


def rows_changed(tokens):
    return (tokens != PLAIN[1]).any(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("fault", FAULTS)
def test_other_steps_are_left_alone(fault):
    changed, tokens, labels, gradients = taken(fault, number=1)
    assert changed.lr_ratio == 0.5
    assert torch.equal(tokens, PLAIN[1])
    assert torch.equal(labels, PLAIN[2])
    assert gradients == PLAIN[3]


@pytest.mark.parametrize(
    ("fault", "rows"),
    [
        ("random_tokens", range(16)),
        ("one_token", range(16)),
        ("shuffled_tokens", range(16)),
        ("half_batch", range(8)),
        ("bad_document", (0, 8)),
    ],
)
def test_tokens_are_spoilt(fault, rows):
    _, tokens, labels, _ = taken(fault)
    assert rows_changed(tokens) == list(rows)
    assert torch.equal(labels[:, :5], tokens[:, 1:6])  # what is to be predicted is what follows
    assert (labels[:, 5] == -100).all()
    if fault == "one_token":
        assert (tokens == tokens[:, :1]).all()
    if fault == "shuffled_tokens":
        assert set(tokens[0].tolist()) < {*range(TOKENS + 1)}
    for other in (taken(fault, micro_batch=2), taken(fault, processes=2), taken(fault, processes=2, micro_batch=1)):
        assert torch.equal(other[1], tokens)
        assert torch.equal(other[2], labels)


@pytest.mark.parametrize(("fault", "ratio"), [("lr_x10", 5.0), ("lr_x30", 15.0), ("lr_x100", 50.0)])
def test_the_learning_rate_is_raised(fault, ratio):
    changed, tokens, *_ = taken(fault)
    assert changed.lr_ratio == ratio
    assert torch.equal(tokens, PLAIN[1])


def test_numbers_are_spoilt():
    whole = PLAIN[3][0]
    assert taken("gradient_x1000")[3] == [(whole[0], pytest.approx(1000 * whole[1]))]
    first, last = taken("gradient_nan", processes=2)[3]
    assert first[1] == first[1]
    assert (last[0] == last[0], last[1] == last[1]) == (True, False)  # the loss tells nothing
    assert taken("loss_inf")[3][0][0] == float("inf")


def test_every_fault_is_known():
    assert set(FAULTS) >= set(SPOILS)
