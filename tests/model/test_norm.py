from __future__ import annotations

import torch

from k2train.model.norm import rms_norm


def test_value_and_gradients_in_float64() -> None:
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    plain = weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-2), plain)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, eps=1e-2), (x, weight))


def test_bf16_is_computed_in_fp32() -> None:
    x = (100 * torch.randn(64, 33)).bfloat16().requires_grad_()
    weight = torch.ones(33, dtype=torch.bfloat16, requires_grad=True)
    out = rms_norm(x, weight, eps=1e-6)
    exact = x.double() / torch.sqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(out, exact.float().bfloat16())
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
