"""Attention and its max logits against plain float64."""

from __future__ import annotations

import pytest
import torch

from k2train.model import block_attention
from k2train.model.causal import attention
from k2train.model.max_logits import max_logits_by_blocks


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Output, maxima and the gradients of sum(out^2), in float64."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    T = q.shape[2]
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    out = logits.softmax(-1) @ v
    return out, logits.amax((0, 2, 3)), torch.autograd.grad(out.square().sum(), (q, k, v))


@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("keep", [True, False])
def test_fp32(length: int, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "KEPT_PROBABILITIES", 2**24 if keep else 0)
    q, k, v = (random(2, 3, length, size, seed=seed) for seed, size in enumerate((10, 10, 7)))
    expected, maxima, gradients = plain(q, k, v, 0.7)
    out, (largest, _) = attention(q, k, v, scale=0.7, with_max=True)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(largest.double(), maxima, atol=0, rtol=1e-6)
    assert not largest.requires_grad
    for got, wanted in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=1e-4)
    assert attention(q, k, v, scale=0.7, with_max=False)[1] is None


def test_bf16_maxima_are_those_of_fp32_logits() -> None:
    q, k, v = (random(2, 3, 200, 24, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    with torch.no_grad():
        q[:, 1] *= 8  # logits above 100, where bf16 is off by 0.5
    expected, maxima, gradients = plain(q, k, v, 0.5)
    out, (largest, _) = attention(q, k, v, scale=0.5, with_max=True)
    torch.testing.assert_close(largest.double(), maxima, atol=0, rtol=1e-6)
    assert largest.dtype == torch.float32
    assert (out.double() - expected).abs().max() < 0.02
    for got, wanted in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients, strict=True):
        assert (got.double() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pass_by_blocks(dtype: torch.dtype) -> None:
    q, k = (random(2, 3, 300, 12, seed=seed, dtype=dtype).detach() for seed in range(2))
    _, maxima, _ = plain(q, k, k, 0.3)
    torch.testing.assert_close(max_logits_by_blocks(q, k, scale=0.3).double(), maxima, atol=0, rtol=1e-6)


def test_negative_maxima() -> None:
    """All visible logits below zero: the maximum is one of them, not the zero of a padding or mask."""
    q = torch.ones(1, 2, 150, 4)
    k = -torch.rand(1, 2, 150, 4, generator=torch.Generator().manual_seed(0)) - 0.1
    _, maxima, _ = plain(q, k, k, 1.0)
    assert maxima.max() < 0
    for dtype in (torch.float32, torch.bfloat16):
        low_q, low_k = q.to(dtype), k.to(dtype)
        expected = plain(low_q, low_k, low_k, 1.0)[1]
        _, (largest, _) = attention(low_q, low_k, low_k, scale=1.0, with_max=True)
        torch.testing.assert_close(largest.double(), expected, atol=0, rtol=1e-6)
        torch.testing.assert_close(max_logits_by_blocks(low_q, low_k, scale=1.0), largest, atol=0, rtol=1e-6)


def test_later_keys_do_not_count() -> None:
    q, k = torch.ones(1, 1, 6, 2), torch.zeros(1, 1, 6, 2)
    q[0, 0, -1], k[0, 0, -1] = 0.0, 50.0  # a huge key that only the last query sees, which is zero
    _, (largest, _) = attention(q, k, k, scale=1.0, with_max=True)
    assert largest.item() == 0.0
    assert max_logits_by_blocks(q, k, scale=1.0).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_shows(dtype: torch.dtype) -> None:
    q, k, v = (random(1, 2, 9, 4, seed=seed, dtype=dtype).detach() for seed in range(3))
    k[0, 1, 3, 0] = float("nan")
    _, (largest, _) = attention(q, k, v, scale=1.0, with_max=True)
    assert largest.isnan().tolist() == [False, True]
    assert max_logits_by_blocks(q, k, scale=1.0).isnan().tolist() == [False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    q, k, v = (random(2, 3, 300, size, seed=seed, dtype=dtype) for seed, size in enumerate((48, 48, 32)))
    expected, maxima, _ = plain(q, k, v, 0.2)
    out, (largest, _) = attention(q.cuda(), k.cuda(), v.cuda(), scale=0.2, with_max=True)
    torch.testing.assert_close(largest.double().cpu(), maxima, atol=0, rtol=1e-5)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.double().cpu(), expected, atol=tolerance, rtol=tolerance)
