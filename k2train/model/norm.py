"""Root mean square norm (arXiv 1910.07467), computed in fp32 (float64 stays float64).

Shapes: D features; leading dimensions are free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RMSNormFunction(torch.autograd.Function):
    """y = w * x / rms(x) with a backward of its own: about half the passes over memory that autograd would make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # vector_norm reads x once; x.pow(2).mean() would write the squares first.
        inverse = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse  # inverse is fp32 or wider, hence so is all that follows
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        grad_unit = grad.to(unit.dtype) * weight
        # The derivative of x / rms(x) takes away the part of the gradient along x.
        along = (grad_unit * unit).mean(-1, keepdim=True)
        grad_x = torch.addcmul(grad_unit, unit, along, value=-1).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension.

    As in DeepSeek-V3, the normalised fp32 value is rounded to the dtype of ``x`` before the weight is applied.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.
    """
    out: Tensor = _RMSNormFunction.apply(x, weight, eps)
    return out


class RMSNorm(nn.Module):
    """``rms_norm`` with its weight."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return rms_norm(x, self.weight, eps=self.eps)
