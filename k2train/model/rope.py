"""Rotary positions (RoPE, arXiv 2104.09864) and their extension YaRN (arXiv 2309.00071), as DeepSeek-V3 uses them.

Shapes: B batch, T tokens, H heads, N nope dims and R rope dims of a head, V dims of a value head.
Rotated pairs are interleaved in the weights: (x0, x1), (x2, x3), ... share a frequency. After rotation the pairs are
laid out as [all first members | all second members]; queries and keys alike, so that their dot products are the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from k2train.config import RopeScalingConfig


def yarn_mscale(*, factor: float, mscale: float) -> float:
    """YaRN's temperature ``0.1 * mscale * ln(factor) + 1`` (arXiv 2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(head_dim: int, scaling: RopeScalingConfig | None) -> float:
    """What q.k is multiplied with: ``head_dim^-1/2``, times YaRN's squared temperature when it is on.

    Args:
        head_dim: nope plus rope dims.
        scaling: YaRN, or None.
    """
    scale = 1.0 / math.sqrt(head_dim)
    if scaling is not None and scaling.mscale_all_dim:
        scale *= yarn_mscale(factor=scaling.factor, mscale=scaling.mscale_all_dim) ** 2
    return scale


def rope_frequencies(dim: int, *, theta: float, scaling: RopeScalingConfig | None) -> Tensor:
    """Radians a position of each pair.

    With YaRN, pairs that turn more than ``beta_fast`` times within the original context keep their frequency, pairs
    that turn less than ``beta_slow`` times are slowed down by ``factor``, and those between are blended linearly
    (arXiv 2309.00071, section 3.2).

    Args:
        dim: rope dims of a head (R).
        theta: base of the geometric series.
        scaling: YaRN, or None.

    Returns:
        [R/2] fp32 on the CPU.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if scaling is None:
        return frequencies

    def pair_that_turns(rotations: float) -> float:
        context = scaling.original_max_position_embeddings
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / scaling.factor * ramp


def rope_table(frequencies: Tensor, length: int, *, scaling: RopeScalingConfig | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to length - 1.

    Args:
        frequencies: [R/2] from ``rope_frequencies``.
        length: positions (T).
        scaling: YaRN, or None; its ``mscale`` over ``mscale_all_dim`` temperature is multiplied in, as in transformers.

    Returns:
        Two [T, R/2] fp32 tensors on the device of ``frequencies``.
    """
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=frequencies.device), frequencies)
    factor = 1.0
    if scaling is not None:
        factor = yarn_mscale(factor=scaling.factor, mscale=1.0)
        if scaling.mscale and scaling.mscale_all_dim:
            factor = yarn_mscale(factor=scaling.factor, mscale=scaling.mscale) / yarn_mscale(
                factor=scaling.factor, mscale=scaling.mscale_all_dim
            )
    return angles.cos() * factor, angles.sin() * factor


def _rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Writes the rotated pairs of x [..., R] (interleaved) into out [..., R] (first members, then second)."""
    half = x.shape[-1] // 2
    first, second = x[..., 0::2], x[..., 1::2]
    out[..., :half] = torch.mul(first, cos).addcmul_(second, sin, value=-1)
    out[..., half:] = torch.mul(second, cos).addcmul_(first, sin)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotates interleaved pairs and leaves them where they are.

    Args:
        x: [..., R].
        turns: [..., R/2] complex, cosine and sine as real and imaginary part.
    """
    pairs = (
        x.to(torch.float32).clone(memory_format=torch.contiguous_format).view(*x.shape[:-1], -1, 2)
    )  # complex views must begin at an even place
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(x.dtype)


def _rotate_back(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The transpose of ``_rotate``: what carries a gradient back."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out[..., 0::2] = torch.mul(first, cos).addcmul_(second, sin)
    out[..., 1::2] = torch.mul(second, cos).addcmul_(first, sin, value=-1)


class _Heads(torch.autograd.Function):
    """Each of q, k, v is written once, in the layout that attention kernels want; autograd would copy thrice."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHd: Tensor, kv_BTHd: Tensor, rope_BTR: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, H, d = q_BTHd.shape
        R = rope_BTR.shape[-1]
        N = d - R
        ctx.save_for_backward(cos, sin)
        ctx.sizes = (N, R, kv_BTHd.shape[-1])
        q, k = q_BTHd.new_empty(B, H, T, d), q_BTHd.new_empty(B, H, T, d)
        q_BHTd, kv_BHTd = q_BTHd.transpose(1, 2), kv_BTHd.transpose(1, 2)
        q[..., :N] = q_BHTd[..., :N]
        _rotate(q[..., N:], q_BHTd[..., N:], cos, sin)
        k[..., :N] = kv_BHTd[..., :N]
        rotated = rope_BTR.new_empty(B, 1, T, R)
        _rotate(rotated, rope_BTR.unsqueeze(1), cos, sin)
        k[..., N:] = rotated
        return q, k, kv_BHTd[..., N:].contiguous()

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        N, R, width = ctx.sizes
        B, H, T, d = grad_q.shape
        out_q, out_kv = grad_q.new_empty(B, T, H, d), grad_q.new_empty(B, T, H, width)
        out_q_BHTd, out_kv_BHTd = out_q.transpose(1, 2), out_kv.transpose(1, 2)
        out_q_BHTd[..., :N] = grad_q[..., :N]
        _rotate_back(out_q_BHTd[..., N:], grad_q[..., N:], cos, sin)
        out_kv_BHTd[..., :N] = grad_k[..., :N]
        out_kv_BHTd[..., N:] = grad_v
        out_rope = grad_k.new_empty(B, T, R)
        wide = torch.promote_types(grad_k.dtype, torch.float32)
        _rotate_back(out_rope.unsqueeze(1), grad_k[..., N:].sum(1, keepdim=True, dtype=wide), cos, sin)
        return out_q, out_kv, out_rope, None, None


def heads(q_BTHd: Tensor, kv_BTHd: Tensor, rope_BTR: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates the rope parts and lays queries, keys and values out by head.

    Args:
        q_BTHd: queries [B, T, H, N + R], [nope | rope] in each head.
        kv_BTHd: [B, T, H, N + V], [nope key | value] in each head.
        rope_BTR: the rope part of the key that all heads share [B, T, R].
        cos: [T, R/2] fp32, or [B, 1, T, R/2] where positions differ between rows.
        sin: likewise.

    Returns:
        q [B, H, T, N + R], k [B, H, T, N + R], v [B, H, T, V], contiguous.
    """
    q, k, v = _Heads.apply(q_BTHd, kv_BTHd, rope_BTR, cos, sin)  # type: ignore[no-untyped-call]
    return q, k, v
