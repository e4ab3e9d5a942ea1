"""Largest logits: by blocks and from the log-sum-exp, against plain float64, on inputs meant to mislead."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.model.causal import attention
from k2train.model.max_logits import CANDIDATES, max_logits_by_blocks, max_logits_by_lse

Maxima = tuple[torch.Tensor, torch.Tensor]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def starts_of(lengths: list[int]) -> torch.Tensor:
    """[1, T] for documents of these lengths."""
    ends = torch.tensor(lengths).cumsum(0)
    return torch.repeat_interleave(ends - torch.tensor(lengths), torch.tensor(lengths))[None]


def plain(q: torch.Tensor, k: torch.Tensor, starts: torch.Tensor | None, scale: float) -> Maxima:
    """Maxima and log-sum-exp in float64."""
    i = torch.arange(q.shape[2])
    first = torch.zeros(1, len(i), dtype=torch.int64) if starts is None else starts
    visible = (i <= i[:, None]) & (i >= first[:, :, None])
    logits = (q.double() @ k.double().transpose(-1, -2) * scale).where(visible[:, None], -math.inf)
    return logits.amax((0, 2, 3)), logits.logsumexp(-1)


def check(q: torch.Tensor, k: torch.Tensor, starts: torch.Tensor | None = None, *, scale: float = 1.0) -> Maxima:
    """The bounds hold, and so does every certificate; returns (found, bound)."""
    largest, lse = plain(q, k, starts, scale)
    found, bound = max_logits_by_lse(q, k, lse, starts, scale=scale)
    assert found.dtype == bound.dtype == torch.float32
    slack = 1e-5 * largest.abs().clamp(min=1)
    assert (found <= largest + slack).all()
    assert (largest <= bound + slack).all()
    assert ((found - largest).abs() <= slack)[found == bound].all()
    torch.testing.assert_close(max_logits_by_blocks(q, k, starts, scale=scale).double(), largest, atol=1e-5, rtol=1e-6)
    return found, bound


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    size=st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]),
    low=st.booleans(),
    one_document=st.booleans(),
)
def test_bounds(
    seed: int, batch: int, heads: int, lengths: list[int], size: float, low: bool, one_document: bool
) -> None:
    dtype = torch.bfloat16 if low else torch.float32
    q, k = (random(batch, heads, sum(lengths), 6, seed=seed + i, dtype=dtype) for i in range(2))
    starts = None if one_document else starts_of(lengths).expand(batch, -1)
    check(q * size, k, starts, scale=0.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hot_heads_are_certified_and_exact(dtype: torch.dtype) -> None:
    """A head with logits of 130 to 200, as QK-Clip meets them: error below 1e-3, of bf16 inputs as well."""
    q, k = (random(2, 4, 300, 16, seed=seed, dtype=dtype) for seed in range(2))
    q[:, 0] *= 8
    largest, _ = plain(q, k, None, 1.0)
    found, bound = check(q, k)
    assert 130 < largest[0] < 300
    assert found[0] == bound[0]
    assert abs(found[0].item() - largest[0].item()) < 1e-3


def test_equal_rows() -> None:
    """All rows tie, so that none can be ruled out: the flat head is only bounded, the peaked one still certified."""
    q, k = torch.ones(1, 2, 200, 4), torch.zeros(1, 2, 200, 4)
    k[0, 1, 0] = 30.0  # every query of head 1 sees one logit of 120 and else zeros
    found, bound = check(q, k)
    assert found.tolist() == [0.0, 120.0]
    assert bound[0].item() == pytest.approx(math.log(200 - CANDIDATES), abs=1e-5)
    assert bound[1] == 120.0


def test_maximum_in_a_row_of_small_lse() -> None:
    """Row 0 sees one key, at 100.5; all others see two at 100, so that their lse is larger: no certificate."""
    q, k = torch.zeros(1, 1, 50, 2), torch.zeros(1, 1, 50, 2)
    q[0, 0, :, 0], q[0, 0, 0, 0] = 100.0, 100.5
    k[0, 0, :2, 0] = 1.0
    q[0, 0, 1] = 0.0
    found, bound = check(q, k)
    assert found.item() == 100.0
    assert bound.item() == pytest.approx(100 + math.log(2), abs=1e-4)


def test_the_worst_sequence_of_a_batch_decides() -> None:
    """One sequence rules all its rows out, the other none: its row 0 holds the maximum, and is no candidate."""
    q, k = torch.ones(2, 1, 100, 1), torch.ones(2, 1, 100, 1)
    q[0] = -10.0
    q[1], q[1, 0, 0] = 3.0, 6.0
    found, bound = check(q, k)
    assert found.item() == 3.0
    assert bound.item() > 6


def test_one_hot_key_that_the_last_query_alone_sees() -> None:
    q, k = (random(1, 1, 100, 4, seed=seed) * 0.1 for seed in range(2))
    q[0, 0, -1], k[0, 0, -1] = 5.0, 7.0
    found, bound = check(q, k)
    assert found.item() == bound.item() == 140.0


def test_hot_key_that_no_query_sees() -> None:
    q, k = torch.ones(1, 1, 60, 2), torch.zeros(1, 1, 60, 2)
    q[0, 0, -1], k[0, 0, -1] = 0.0, 50.0
    found, bound = check(q, k)
    assert found.item() == 0.0
    assert bound.item() < 5


def test_hot_pair_across_documents_does_not_count() -> None:
    q, k = (random(1, 1, 60, 4, seed=seed) * 0.1 for seed in range(2))
    k[0, 0, 10], q[0, 0, 40] = 20.0, 20.0
    starts = starts_of([30, 30])
    assert plain(q, k, None, 1.0)[0] > 1000
    found, bound = check(q, k, starts)
    assert bound.item() < 100
    assert found.item() <= bound.item()


def test_rows_of_one_key_are_exact() -> None:
    """Where every token is a document of its own, as padding may be, lse is the logit itself."""
    q, k = (random(2, 3, 50, 4, seed=seed) for seed in range(2))
    found, bound = check(q, k, torch.arange(50).expand(2, -1))
    assert torch.equal(found, bound)
    assert torch.allclose(found, (q * k).sum(-1).amax((0, 2)))


@pytest.mark.parametrize("length", [1, 2, CANDIDATES, CANDIDATES + 1])
def test_short(length: int) -> None:
    """With no more rows than candidates all of them are computed, and the maximum is exact however flat the head."""
    q, k = (random(2, 3, length, 4, seed=seed) * 0.01 for seed in range(2))
    found, bound = check(q, k)
    if length <= CANDIDATES:
        assert torch.equal(found, bound)


def test_negative() -> None:
    q, k = torch.ones(1, 2, 150, 4), -random(1, 2, 150, 4, seed=0).abs() - 0.1
    found, _ = check(q, k)
    assert found.max() < 0


def test_huge() -> None:
    """Logits of 1e4, where fp32 itself is off by 1e-3."""
    q, k = (random(1, 2, 150, 8, seed=seed) * 50 for seed in range(2))
    found, bound = check(q, k)
    assert found.min() > 1e4
    assert torch.equal(found, bound)


@pytest.mark.parametrize("backend", ["block", "flash_cpu", "math"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_overflow_and_nan_show(backend: str, bad: float) -> None:
    """An infinite logit reads as infinite or NaN, a NaN as NaN; the other head is untouched."""
    q, k, v = (random(1, 2, 40, 4, seed=seed) for seed in range(3))
    k[0, 1, 3], q[0, 1, 20] = bad, abs(bad) if bad == bad else 1.0
    _, maxima = attention(q, k, v, scale=1.0, with_max=True, backend=backend)
    expected, _ = plain(q[:, :1], k[:, :1], None, 1.0)
    assert maxima.largest[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert not maxima.largest[1].isfinite()
    assert maxima.largest[1].isnan() or maxima.largest[1] > 0
    if bad != bad:
        assert maxima.largest[1].isnan()
        assert maxima.fallbacks.item() <= 1  # NaN is an answer: no pass by blocks for it


def test_logits_of_minus_infinity() -> None:
    """A query that is turned to -inf against every key cannot hide the maximum of the others."""
    q, k, v = (random(1, 1, 40, 4, seed=seed).abs() for seed in range(3))
    q[0, 0, 7] = -math.inf
    for backend in ("block", "flash_cpu", "math"):
        _, maxima = attention(q, k, v, scale=1.0, with_max=True, backend=backend)
        assert maxima.largest.item() == plain(q, k, None, 1.0)[0].float().item()
