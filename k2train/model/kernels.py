"""torch's fused attention kernels, called by name: scaled_dot_product_attention drops the log-sum-exp they compute.

Shapes: B batch, H heads, T tokens, d query and key dims, V value dims (V and d may differ). All of them are causal and
differentiable in q, k and v: their aten operators carry torch's own backward formulas.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def _padded(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def document_bias(q: Tensor, starts_BT: Tensor, *, hidden: float = float("-inf"), align: int = 1) -> Tensor:
    """What to add to the logits: 0 where the key is visible.

    Args:
        q: [B, H, T, d], for dtype and device.
        starts_BT: the first key that a query sees.
        hidden: what to add elsewhere.
        align: rows begin at a multiple of so many elements, as the CUDA kernels want.

    Returns:
        [B, 1, T, T].
    """
    T = starts_BT.shape[1]
    keys = torch.arange(T, device=q.device)
    visible = (keys <= keys[:, None]) & (keys >= starts_BT[:, :, None])
    bias = q.new_full((len(starts_BT), T, -(-T // align) * align), hidden)
    bias[:, :, :T].masked_fill_(visible, 0.0)
    return bias[:, None, :, :T]


def flash_cpu(q: Tensor, k: Tensor, v: Tensor, starts_BT: Tensor | None, *, scale: float) -> tuple[Tensor, Tensor]:
    """torch's flash kernel for CPUs. Heads of q, k and v must be of one width, hence zeros.

    Args:
        q: [B, H, T, d].
        k: [B, H, T, d].
        v: [B, H, T, V].
        starts_BT: the first key that a query sees; None for 0.
        scale: of the logits.

    Returns:
        out [B, H, T, V] and log-sum-exp [B, H, T] fp32, as all functions here.
    """
    width = max(q.shape[-1], v.shape[-1])
    mask = None if starts_BT is None else document_bias(q, starts_BT)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        _padded(q, width), _padded(k, width), _padded(v, width), 0.0, mask is None, attn_mask=mask, scale=scale
    )
    return out[..., : v.shape[-1]], lse


def flash(q: Tensor, k: Tensor, v: Tensor, starts_BT: Tensor | None, *, scale: float) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 on CUDA: bf16 or fp16, one width that is a multiple of 8 and at most 256, no documents."""
    if starts_BT is not None:
        raise ValueError("starts: the flash kernel takes no documents; use the efficient, cudnn or flex back end")
    width = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        _padded(q, width), _padded(k, width), _padded(v, width), 0.0, True, scale=scale
    )
    return out[..., : v.shape[-1]], lse


def efficient(q: Tensor, k: Tensor, v: Tensor, starts_BT: Tensor | None, *, scale: float) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel on CUDA, for fp32 too. It pads the rows of its log-sum-exp to a multiple of 32."""
    mask = None if starts_BT is None else document_bias(q, starts_BT, align=16).expand(-1, q.shape[1], -1, -1)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, mask is None, scale=scale)
    return out, lse[:, :, : q.shape[2]]


def cudnn(q: Tensor, k: Tensor, v: Tensor, starts_BT: Tensor | None, *, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN's kernel: bf16 or fp16, V and d may differ. Its log-sum-exp is [B, H, T, 1]."""
    mask = None
    if starts_BT is not None:  # hidden by the number that torch gives cuDNN for a boolean mask
        mask = document_bias(q, starts_BT, hidden=-65504.0, align=16).expand(-1, q.shape[1], -1, -1)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, mask, True, 0.0, mask is None, False, scale=scale)
    return out, lse.view(q.shape[:3])


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(q: Tensor, k: Tensor, v: Tensor, starts_BT: Tensor | None, *, scale: float) -> tuple[Tensor, Tensor]:
    """FlexAttention, compiled for CUDA: the only kernel that tells maxima itself, and that skips other documents.

    Returns:
        out [B, H, T, V] and each row's largest logit [B, H, T] fp32.
    """
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) if starts_BT is None else (j <= i) & (j >= starts_BT[b, i])

    B, T = (None if starts_BT is None else len(starts_BT)), q.shape[2]
    mask = create_block_mask(visible, B, None, T, T, device=q.device)
    out, aux = _compiled_flex()(q, k, v, block_mask=mask, scale=scale, return_aux=AuxRequest(max_scores=True))
    return out, aux.max_scores
