from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from k2train.model import experts
from k2train.model.experts import expert_mlps


def weights(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 5, 7), (4, 5, 7), (4, 7, 5)]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def plain(x: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor, loads: torch.Tensor) -> torch.Tensor:
    expert = torch.repeat_interleave(torch.arange(len(loads)), loads)
    rows = [w2[e] @ (F.silu(w1[e] @ row) * (w3[e] @ row)) for row, e in zip(x, expert.tolist(), strict=True)]
    return torch.stack(rows) if rows else x


@pytest.mark.parametrize("loads", [[3, 1, 2, 4], [0, 6, 0, 1], [0, 0, 0, 9]])
def test_values_and_gradients(loads: list[int]) -> None:
    x = torch.randn(sum(loads), 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    w1, w3, w2 = weights()
    counts = torch.tensor(loads)
    expected, got = plain(x, w1, w3, w2, counts), expert_mlps(x, w1, w3, w2, counts)
    torch.testing.assert_close(got, expected)
    probe = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(expected, (x, w1, w3, w2), probe, allow_unused=True)
    for value, reference in zip(torch.autograd.grad(got, (x, w1, w3, w2), probe), wanted, strict=True):
        assert reference is not None
        torch.testing.assert_close(value, reference)


def test_no_rows_at_all_still_give_gradients() -> None:
    """A process whose experts get no token must take part in the gradient reduction with zeros."""
    x, (w1, w3, w2) = torch.zeros(0, 7, dtype=torch.float64, requires_grad=True), weights()
    out = expert_mlps(x, w1, w3, w2, torch.zeros(4, dtype=torch.int64))
    assert out.shape == (0, 7)
    for gradient, weight in zip(torch.autograd.grad(out.sum(), (w1, w3, w2)), (w1, w3, w2), strict=True):
        assert torch.equal(gradient, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_agree_with_the_loop(dtype: torch.dtype) -> None:
    """What a GPU runs; grouped_mm has a CPU implementation too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 16, generator=generator).to(dtype).requires_grad_()
    w1, w3 = (torch.randn(4, 24, 16, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    w2 = torch.randn(4, 16, 24, generator=generator).to(dtype).requires_grad_()
    loads = torch.tensor([9, 0, 4, 7])
    tensors = (x, w1, w3, w2)
    one, other = expert_mlps(*tensors, loads), experts._grouped(*tensors, loads)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    probe = torch.randn(one.shape, generator=generator).to(dtype)
    pairs = zip(
        (one, *torch.autograd.grad(one, tensors, probe)),
        (other, *torch.autograd.grad(other, tensors, probe)),
        strict=True,
    )
    for a, b in pairs:
        assert (a - b).norm() <= tolerance * a.norm()


def test_second_backward_gives_the_same() -> None:
    x, (w1, w3, w2) = torch.randn(4, 7, dtype=torch.float64, requires_grad=True), weights()
    out = expert_mlps(x, w1, w3, w2, torch.tensor([1, 0, 2, 1])).square().sum()
    first = torch.autograd.grad(out, (x, w1, w3, w2), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, (x, w1, w3, w2)), strict=True):
        assert torch.equal(a, b)
