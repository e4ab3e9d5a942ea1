"""Causal softmax attention that also tells each head's largest logit.

Shapes: B batch, H heads, n = B*H, T tokens, d query and key dims, V value dims (V and d may differ).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k2train.model.max_logits import max_logits_by_blocks

# Rows of q a block on the CPU: of 32, 64, 128 and 256, 64 and 128 were fastest; the logits of a block stay in cache.
ROWS = 128
# Probabilities that one call may keep for its backward pass; above, they are computed again. 64 MiB in fp32.
KEPT_PROBABILITIES = 2**24


class _BlockAttention(torch.autograd.Function):
    """Attention by blocks of rows against the keys that they can see: nothing above the diagonal is computed.

    It has the logits at hand, so that their maxima cost one read in cache, in any dtype exactly. Measured in fp32 on a
    CPU, forward and backward, against torch's flash kernel with V padded to d (which tells no maxima): 1.2 to 1.4 times
    as fast at 256 and 512 tokens, about as fast at 2048, 0.8 times at 4096, where probabilities are made again.
    """

    @staticmethod
    def _block(q_nTd: Tensor, k_nTd: Tensor, mask: Tensor, start: int, scale: float) -> Tensor:
        stop = start + mask.shape[0]
        # beta=0 ignores the first argument: this is bmm with a scale.
        out = torch.baddbmm(
            q_nTd[:1, :1, :1], q_nTd[:, start:stop], k_nTd[:, :stop].transpose(1, 2), beta=0, alpha=scale
        )
        # A triangle of zeros, then a sum: a fifth of the time of masked_fill_, and a hidden infinity makes no NaN.
        out[:, :, start:].tril_().add_(mask)
        return out

    @staticmethod
    def forward(
        ctx: Any, q_nTd: Tensor, k_nTd: Tensor, v_nTV: Tensor, scale: float, with_max: bool
    ) -> tuple[Tensor, Tensor]:
        n, T, _ = q_nTd.shape
        keep = any(ctx.needs_input_grad) and n * T * T // 2 <= KEPT_PROBABILITIES
        q, k = _wide(q_nTd), _wide(k_nTd)
        mask = q.new_full((min(ROWS, T), min(ROWS, T)), float("-inf")).triu_(1)
        out, maxima, kept = torch.empty_like(v_nTV), q.new_full((n,), float("-inf")), []
        for start in range(0, T, ROWS):
            stop = min(start + ROWS, T)
            logits = _BlockAttention._block(q, k, mask[: stop - start, : stop - start], start, scale)
            if with_max:
                maxima = torch.maximum(maxima, logits.amax((1, 2)))
            probabilities = logits.softmax(-1).to(v_nTV.dtype)
            out[:, start:stop] = torch.bmm(probabilities, v_nTV[:, :stop])
            if keep:
                kept.append(probabilities)
        ctx.save_for_backward(q_nTd, k_nTd, v_nTV, mask, *kept)
        ctx.scale = scale
        ctx.mark_non_differentiable(maxima)
        return out, maxima

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, mask, *kept = ctx.saved_tensors
        T, scale = q.shape[1], ctx.scale
        grad_q = torch.empty_like(q)
        # Summed over blocks, hence in fp32 at least.
        grad_k, grad_v = torch.zeros_like(_wide(k)), torch.zeros_like(_wide(v))
        for block, start in enumerate(range(0, T, ROWS)):
            stop = min(start + ROWS, T)
            if kept:
                p = kept[block]
            else:
                part = mask[: stop - start, : stop - start]
                p = _BlockAttention._block(_wide(q), _wide(k), part, start, scale).softmax(-1).to(v.dtype)
            grad_rows = grad[:, start:stop]
            grad_p = torch.bmm(grad_rows, v[:, :stop].transpose(1, 2))
            grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, start:stop] = torch.baddbmm(q[:1, :1, :1], grad_s, k[:, :stop], beta=0, alpha=scale)
            _add_bmm(grad_k[:, :stop], grad_s.transpose(1, 2), q[:, start:stop], scale)
            _add_bmm(grad_v[:, :stop], p.transpose(1, 2), grad_rows, 1.0)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    """x in fp32 at least. A logit of 130 in bf16 is off by up to 0.5, and so would be its place in the softmax."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _add_bmm(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """``total += scale * a @ b`` where a and b may be of a narrower dtype than total."""
    if a.dtype == total.dtype:
        total.baddbmm_(a, b, alpha=scale)
    else:
        total.add_(torch.bmm(a, b), alpha=scale)


def attention(
    q_BHTd: Tensor, k_BHTd: Tensor, v_BHTV: Tensor, *, scale: float, with_max: bool
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale * q k^T) v`` over the visible pairs (key no later than query).

    Args:
        q_BHTd: queries.
        k_BHTd: keys.
        v_BHTV: values.
        scale: of the logits, positive.
        with_max: whether the largest logits are wanted.

    Returns:
        out [B, H, T, V] and, if wanted, each head's largest logit [H]: exactly the maximum over the batch and all
        visible pairs of the logits in fp32, whatever dtype attention runs in. It carries no gradient.
    """
    B, H, T, _ = q_BHTd.shape
    if q_BHTd.is_cuda:
        out = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTV, is_causal=True, scale=scale)
        with torch.no_grad():
            return out, max_logits_by_blocks(q_BHTd, k_BHTd, scale=scale) if with_max else None
    q, k, v = q_BHTd.flatten(0, 1), k_BHTd.flatten(0, 1), v_BHTV.flatten(0, 1)
    out, maxima = _BlockAttention.apply(q, k, v, scale, with_max)  # type: ignore[no-untyped-call]
    return out.view(B, H, T, -1), maxima.view(B, H).amax(0).float() if with_max else None
