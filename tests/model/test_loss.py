from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from k2train.model import loss
from k2train.model.loss import cross_entropy


@pytest.fixture(params=["kept", "made again", "one chunk"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tokens a chunk of a vocabulary of 13, or all at once."""
    if request.param != "one chunk":
        monkeypatch.setattr(loss, "CHUNK_LOGITS", 7 * 13)
    if request.param == "made again":
        monkeypatch.setattr(loss, "KEPT_LOGITS", 0)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(13, 5, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(13, (30,), generator=generator)
    labels[::4] = -100
    return x, weight, labels


@pytest.mark.usefixtures("chunks")
def test_value_and_gradients() -> None:
    x, weight, labels = inputs(torch.float64)
    expected = F.cross_entropy(x @ weight.T, labels, reduction="none")
    got = cross_entropy(x, weight, labels)
    torch.testing.assert_close(got, expected)
    assert (got[::4] == 0).all()
    probe = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, (x, weight), probe)
    for value, reference in zip(torch.autograd.grad(got, (x, weight), probe), wanted, strict=True):
        torch.testing.assert_close(value, reference)


@pytest.mark.usefixtures("chunks")
def test_bf16_gives_fp32_nats() -> None:
    x, weight, labels = inputs(torch.bfloat16)
    got = cross_entropy(x, weight, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, F.cross_entropy((x @ weight.T).float(), labels, reduction="none"))
    got.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert (x.grad[::4] == 0).all()


@pytest.mark.usefixtures("chunks")
def test_nothing_but_ignored_labels() -> None:
    x, weight, labels = inputs(torch.float32)
    got = cross_entropy(x, weight, torch.full_like(labels, -100))
    assert (got == 0).all()
    got.sum().backward()
    assert (x.grad == 0).all()
    assert (weight.grad == 0).all()


def test_large_logits_do_not_overflow() -> None:
    x, weight, labels = inputs(torch.float32)
    assert cross_entropy(x * 1e4, weight, labels).isfinite().all()


def test_logits_are_not_held_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "KEPT_LOGITS", 0)
    x, weight, labels = inputs(torch.float32)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        cross_entropy(x, weight, labels)
    assert torch.Size([30, 13]) not in saved
    assert saved
