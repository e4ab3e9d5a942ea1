"""The routed experts against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from k2train.model import experts
from k2train.model.experts import routed_experts
from k2train.model.permutation import combine, sorted_order, spread

D, INTER, E = 8, 6, 5


def inputs(index: list[list[int]], *, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """x, the experts, their weights, w1, w3, w2, loads."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(to).requires_grad_()

    index_NK = torch.tensor(index, dtype=torch.int64).view(len(index), -1 if index else 2)
    scores = draw(*index_NK.shape, to=torch.promote_types(dtype, torch.float32))
    loads = torch.bincount(index_NK.flatten(), minlength=E)
    return draw(len(index), D), index_NK, scores, draw(E, INTER, D), draw(E, INTER, D), draw(E, D, INTER), loads


def plain(x, index, weights, w1, w3, w2, loads):
    rows = []
    for row, chosen, scores in zip(x, index.tolist(), weights, strict=True):
        outputs = [w2[e] @ (F.silu(w1[e] @ row) * (w3[e] @ row)) for e in chosen]
        rows.append(torch.stack([score * out for score, out in zip(scores, outputs, strict=True)]).sum(0))
    return torch.stack(rows)


def grouped(x, index, weights, w1, w3, w2, loads):
    """What a GPU runs; grouped_mm has a CPU implementation too."""
    return experts._grouped(x, index, weights, w1, w3, w2, loads, recompute=False)


def differentiated(function, tensors):
    """The output, and the gradients of tokens, routing weights and experts' weights."""
    out = function(*tensors)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    grads = torch.autograd.grad(out, wanted, probe, allow_unused=True)
    return [out, *(torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True))]


ROUTINGS = {
    "every expert": [[0, 1], [1, 2], [4, 3], [0, 2], [2, 1], [3, 0]],
    "experts without a token": [[1, 3], [3, 1], [1, 4]],
    "one expert a token": [[2], [2], [0], [2]],
    "all experts for each token": [[4, 0, 3, 1, 2], [0, 1, 2, 3, 4]],
    "one token": [[0, 4]],
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_values_and_gradients(routing: str) -> None:
    tensors = inputs(ROUTINGS[routing])
    for got, expected in zip(differentiated(routed_experts, tensors), differentiated(plain, tensors), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_bf16_with_its_padded_rows(routing: str) -> None:
    tensors = inputs(ROUTINGS[routing], dtype=torch.bfloat16)
    exact = tuple(t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors)
    for got, expected in zip(differentiated(routed_experts, tensors), differentiated(plain, exact), strict=True):
        assert got.dtype in (torch.bfloat16, torch.float32)  # the routing weights' gradient is fp32
        assert (got.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_agree_with_the_loop(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    index = [torch.randperm(E - 1, generator=generator)[:2].tolist() for _ in range(21)]  # expert E-1 gets none
    x, index, scores, *_, loads = inputs(index, dtype=dtype)
    x = torch.randn(21, 16, generator=generator).to(dtype).requires_grad_()
    w1, w3 = (torch.randn(E, 24, 16, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    w2 = torch.randn(E, 16, 24, generator=generator).to(dtype).requires_grad_()
    tensors = (x, index, scores, w1, w3, w2, loads)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for one, other in zip(differentiated(routed_experts, tensors), differentiated(grouped, tensors), strict=True):
        assert (one - other).norm() <= tolerance * one.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_token_at_all_still_gives_gradients(dtype: torch.dtype) -> None:
    """A process whose experts get no token must take part in the gradient reduction with zeros."""
    out, grad_x, grad_weights, *grads = differentiated(routed_experts, inputs([], dtype=dtype))
    assert out.shape == grad_x.shape == (0, D)
    assert grad_weights.shape == (0, 2)
    assert [tuple(grad.shape) for grad in grads] == [(E, INTER, D), (E, INTER, D), (E, D, INTER)]
    assert not any(grad.any() for grad in grads)


def test_second_backward_gives_the_same() -> None:
    x, index, scores, w1, w3, w2, loads = inputs(ROUTINGS["every expert"])
    out = routed_experts(x, index, scores, w1, w3, w2, loads).square().sum()
    first = torch.autograd.grad(out, (x, scores, w1, w3, w2), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, (x, scores, w1, w3, w2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permutation_of_no_token_at_all(dtype: torch.dtype) -> None:
    """A process may have no row, and yet all of its group must meet in both passes."""
    x, index, scores, *_ = inputs([], dtype=dtype)
    order, place = sorted_order(index.flatten())
    out, *grads = differentiated(lambda x, s: combine(spread(x, order, place), s, order, place), (x, scores))
    assert out.shape == grads[0].shape == (0, D)
    assert grads[1].shape == (0, 2)


def test_combine_in_bf16_rounds_neither_weights_nor_their_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(40, 256, generator=generator).bfloat16().requires_grad_()
    weights = torch.rand(20, 2, generator=generator).requires_grad_()
    order, place = sorted_order(torch.randint(E, (40,), generator=generator))
    exact = [y.detach().double().requires_grad_(), weights.detach().double().requires_grad_()]
    found = differentiated(lambda y, w: combine(y, w, order, place), (y, weights))
    expected = differentiated(lambda y, w: (y[place].view(20, 2, -1) * w[..., None]).sum(1), exact)
    for got, wanted, tolerance in zip(found, expected, (4e-3, 4e-3, 1e-6), strict=True):
        assert (got.double() - wanted).norm() <= tolerance * wanted.norm()
    # A row's own scale is the weight's, not the nearest bf16: its errors have no common sign.
    bias = (found[1].double() / expected[1]).nanmean(1) - 1
    assert bias.abs().max() <= 1e-3  # with rounded weights up to 4e-3


def test_spread_and_combine_against_plain_indexing() -> None:
    x, index, scores, *_ = inputs(ROUTINGS["every expert"])
    order, place = sorted_order(index.flatten())
    rows = spread(x, order, place)
    assert torch.equal(rows, x[order // 2])
    assert torch.equal(rows[place], x.repeat_interleave(2, 0))
    for got, expected in zip(
        differentiated(lambda x, scores: combine(spread(x, order, place).sin(), scores, order, place), (x, scores)),
        differentiated(lambda x, scores: scores.sum(1, keepdim=True) * x.sin(), (x, scores)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
