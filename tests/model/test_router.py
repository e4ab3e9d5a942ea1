"""Each formula of the router against DeepSeek-V3's report, written out in float64 with plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from k2train.model import Transformer
from k2train.model.router import count_loads, gate_weights, select, sequence_balance_loss, update_bias


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_selection_is_by_score_plus_bias() -> None:
    s, bias = scores(50, 8), scores(8, seed=1) - 0.5
    got = select(s, bias, top_k=3, n_group=1, topk_group=1)
    for row, chosen in zip(s.tolist(), got.tolist(), strict=True):
        ranked = sorted(range(8), key=lambda e: row[e] + bias[e].item(), reverse=True)
        assert sorted(chosen) == sorted(ranked[:3])
    assert not torch.equal(got.sort().values, select(s, 0 * bias, top_k=3, n_group=1, topk_group=1).sort().values)


def test_selection_within_the_best_groups() -> None:
    s, bias = scores(50, 12), scores(12, seed=1) - 0.5
    got = select(s, bias, top_k=3, n_group=4, topk_group=2)
    for row, chosen in zip((s + bias).tolist(), got.tolist(), strict=True):
        worth = [sum(sorted(row[3 * g : 3 * g + 3])[-2:]) for g in range(4)]
        best = sorted(range(4), key=worth.__getitem__)[-2:]
        allowed = [e for e in range(12) if e // 3 in best]
        assert sorted(chosen) == sorted(sorted(allowed, key=row.__getitem__)[-3:])


def test_selection_survives_scores_below_zero() -> None:
    """A shut group must lose even against biases that push all sums below zero."""
    got = select(scores(20, 6), torch.full((6,), -5.0), top_k=2, n_group=3, topk_group=1)
    assert (got // 2 == got[:, :1] // 2).all()


@pytest.mark.parametrize("normalise", [True, False])
def test_weights(normalise: bool) -> None:
    s, index = scores(20, 8), torch.tensor([[0, 3, 5]]).repeat(20, 1)
    got = gate_weights(s, index, normalise=normalise, scale=2.827)
    for row, weights in zip(s.tolist(), got.tolist(), strict=True):
        chosen = [row[0], row[3], row[5]]
        total = sum(chosen) if normalise else 1.0
        assert weights == pytest.approx([2.827 * c / total for c in chosen], rel=1e-12)


def test_weights_of_underflowed_scores_are_finite() -> None:
    got = gate_weights(torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]]), normalise=True, scale=2.5)
    assert (got == 0).all()


def test_loads() -> None:
    assert count_loads(torch.tensor([[0, 3], [3, 1], [3, 0]]), experts=5).tolist() == [2, 1, 0, 3, 0]


def test_bias_update() -> None:
    bias, loads = torch.tensor([0.1, -0.2, 0.0, 0.3]), torch.tensor([9, 5, 1, 5])  # mean 5
    got = update_bias(bias, loads, rate=1e-3)
    torch.testing.assert_close(got, torch.tensor([0.099, -0.2, 0.001, 0.3]))
    assert got.dtype == torch.float32
    assert bias.tolist() == pytest.approx([0.1, -0.2, 0.0, 0.3])  # its argument is left alone
    assert torch.equal(update_bias(bias, torch.zeros(4, dtype=torch.int64), rate=1e-3), bias)


def test_bias_update_tells_apart_loads_beyond_fp32() -> None:
    loads = torch.tensor([2**40, 2**40 + 2])
    assert update_bias(torch.zeros(2), loads, rate=1.0).tolist() == [1.0, -1.0]


def test_balance_loss() -> None:
    B, T, E, K, alpha = 3, 7, 6, 2, 1e-4
    s = scores(B, T, E)
    total = 0.0
    for b in range(B):
        for e in range(E):
            f = P = 0.0
            for t in range(T):
                row = s[b, t].tolist()
                f += E / (K * T) * (e in sorted(range(E), key=row.__getitem__)[-K:])
                P += row[e] / sum(row) / T
            total += alpha * f * P / B
    assert sequence_balance_loss(s, top_k=K, weight=alpha).item() == pytest.approx(total, rel=1e-12)


def test_balance_loss_gradient() -> None:
    s = scores(2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sequence_balance_loss(x, top_k=2, weight=0.3), (s,))


def test_balance_loss_of_uniform_scores_is_its_weight() -> None:
    assert sequence_balance_loss(torch.full((2, 9, 4), 0.5), top_k=2, weight=0.1).item() == pytest.approx(0.1)


def test_balance_reaches_the_router_through_the_model(
    make_model: Callable[..., Transformer], make_tokens: Callable[..., torch.Tensor]
) -> None:
    model, tokens = make_model(balance_loss_weight=0.01), make_tokens(2, 10)
    _, balance = model(tokens, tokens)
    assert balance.ndim == 0
    assert 0.01 < balance.item() < 0.06  # two layers, each at least near its weight
    balance.backward()
    for _, moe in model.moe_layers():
        assert moe.gate.weight.grad.abs().max() > 0


def test_repeated_updates_balance_a_skewed_router() -> None:
    """What the rule is for: with fixed skewed scores, the largest load falls towards the mean."""
    s = torch.sigmoid(torch.linspace(-1, 1, 8) + torch.randn(512, 8, generator=torch.Generator().manual_seed(0)))
    bias, spread = torch.zeros(8), []
    for _ in range(400):
        loads = count_loads(select(s, bias, top_k=2, n_group=1, topk_group=1), experts=8)
        spread.append(loads.max().item() / 128)
        bias = update_bias(bias, loads, rate=1e-3)
    assert spread[0] > 1.5
    assert spread[-1] < 1.1
    assert math.isfinite(bias.sum().item())
