"""The formulas of one step, each against its textbook form."""

import math

import pytest
import torch
from muonclip.update import adamw_, apply_updates_, momentum_directions, muon_scale


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_the_decayed_sum_of_gradients(nesterov):
    grads = [torch.randn(3, 4, dtype=torch.float64) for _ in range(3)]
    buffer, expected = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    for grad in grads:
        kept = grad.clone()
        (direction,) = momentum_directions([grad], [buffer], momentum=0.9, nesterov=nesterov)
        expected = 0.9 * expected + grad
        torch.testing.assert_close(direction, grad + 0.9 * expected if nesterov else expected)
        torch.testing.assert_close(buffer, expected)
        assert torch.equal(grad, kept)


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_bfloat16_momentum_is_computed_in_float32_and_rounded_once(nesterov):
    torch.manual_seed(0)
    buffer, kept = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.bfloat16)
    for _ in range(3):
        grad = torch.randn(3, 4)
        (direction,) = momentum_directions([grad], [buffer], momentum=0.9, nesterov=nesterov)
        average = 0.9 * kept.float() + grad
        torch.testing.assert_close(direction, grad + 0.9 * average if nesterov else average)
        kept = average.bfloat16()
        assert torch.equal(buffer, kept)


def test_the_scale_gives_an_orthogonal_update_the_rms_of_adamw():
    orthogonal = torch.linalg.qr(torch.randn(64, 16))[0]
    update = orthogonal * muon_scale(64, 16)
    assert math.isclose(update.square().mean().sqrt().item(), 0.2, rel_tol=1e-5)
    assert muon_scale(64, 16) == muon_scale(16, 64) == 0.2 * 8


def test_decay_is_decoupled():
    weight, update = torch.randn(3, 4), torch.randn(3, 4)
    expected = weight - 0.1 * (update + 0.5 * weight)
    apply_updates_([weight], [update], lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("form", ["plain", "transposed", "strided", "bfloat16"])
def test_adamw_equals_torch_whatever_the_memory_looks_like(form):
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    start = {"plain": base, "transposed": base.t(), "strided": base[:, ::2], "bfloat16": base.bfloat16()}[form]
    beside = base[:, 1::2].clone()
    reference = torch.nn.Parameter(start.detach().float().contiguous().clone())
    other = torch.optim.AdamW([reference], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    state = {"exp_avg": torch.zeros(start.shape), "exp_avg_sq": torch.zeros(start.shape), "step": torch.zeros(())}
    for _ in range(4):
        grad = torch.randn(start.shape).to(start.dtype)
        reference.grad = grad.float()
        if form == "bfloat16":
            reference.data.copy_(start)  # the weight itself is rounded after every step
        other.step()
        adamw_([start], [grad], [state], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    torch.testing.assert_close(start, reference.detach().to(start.dtype), atol=1e-6, rtol=1e-6)
    assert state["step"] == 4
    if form == "strided":  # what lies between the elements belongs to others
        assert torch.equal(base[:, 1::2], beside)
