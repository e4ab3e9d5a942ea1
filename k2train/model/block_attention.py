"""Causal attention on a CPU by blocks whose logits stay in cache, so that their maximum costs one read there.

Shapes: B batch, H heads, n = B*H, T tokens, d query and key dims, V value dims (V and d may differ). A block is G of
the n times R rows of q against the C keys from the first that any of them sees to the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rows of q a block: of 32, 64, 128 and 256, 64 and 128 were fastest.
ROWS = 128
# Logits of a block a thread: n is cut into groups that keep to it. 1 MiB in fp32, about a core's L2 cache.
BLOCK = 2**18
# Probabilities that one call may keep for its backward pass; above, they are computed again. 64 MiB in fp32.
KEPT_PROBABILITIES = 2**24


class _Block(NamedTuple):
    """Rows ``start`` to ``stop`` of the sequences in ``group``, and ``first``, the first key that any of them sees."""

    group: slice
    start: int
    stop: int
    first: int


def _blocks(n: int, length: int, size: int, starts_nT: Tensor | None) -> Iterator[_Block]:
    """The blocks in groups of ``size`` sequences."""
    for i in range(0, n, size):
        group = slice(i, min(i + size, n))
        for start in range(0, length, ROWS):
            stop = min(start + ROWS, length)
            first = 0 if starts_nT is None else int(starts_nT[group, start:stop].min())
            yield _Block(group, start, stop, first)


def _logits(
    q_nTd: Tensor, k_nTd: Tensor, mask_RR: Tensor, starts_nT: Tensor | None, block: _Block, scale: float
) -> Tensor:
    """[G, R, C] logits with -inf where the key is hidden."""
    group, start, stop, first = block
    keys = k_nTd[group, first:stop].transpose(1, 2)
    # beta=0 ignores the first argument: this is bmm with a scale.
    out = torch.baddbmm(q_nTd[:1, :1, :1], q_nTd[group, start:stop], keys, beta=0, alpha=scale)
    # A triangle of zeros, then a sum: a fifth of the time of masked_fill_, and a hidden infinity makes no NaN.
    out[:, :, start - first :].tril_().add_(mask_RR[: stop - start, : stop - start])
    if starts_nT is not None:
        starts = starts_nT[group, start:stop, None]
        if bool((starts > first).any()):
            out.masked_fill_(torch.arange(first, stop) < starts, float("-inf"))
    return out


@torch.library.custom_op("k2train::block_attention", mutates_args=())
def _attend(
    q_nTd: Tensor, k_nTd: Tensor, v_nTV: Tensor, starts_nT: Tensor | None, scale: float, with_max: bool, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs, maxima of each sequence, and probabilities if they are to be kept.

    One operator, so that selective checkpointing can keep what it returns.
    """
    n, T, _ = q_nTd.shape
    q, k, mask = _wide(q_nTd), _wide(k_nTd), _mask(q_nTd)
    out, kept = torch.empty_like(v_nTV), []
    maxima = q.new_full((n, -(-T // ROWS)), float("-inf"))
    for block in _blocks(n, T, _group_size(T), starts_nT):
        group, start, stop, first = block
        logits = _logits(q, k, mask, starts_nT, block, scale)
        if with_max:
            torch.amax(logits, (1, 2), out=maxima[group, start // ROWS])
        probabilities = logits.softmax(-1).to(v_nTV.dtype)
        out[group, start:stop] = torch.bmm(probabilities, v_nTV[group, first:stop])
        if keep:
            kept.append(probabilities)
    return out, maxima.amax(1), kept


class _BlockAttention(torch.autograd.Function):
    """Attention by blocks of rows against the keys that they can see: nothing above the diagonal is computed."""

    @staticmethod
    def forward(
        ctx: Any,
        q_nTd: Tensor,
        k_nTd: Tensor,
        v_nTV: Tensor,
        starts_nT: Tensor | None,
        scale: float,
        with_max: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        n, T, _ = q_nTd.shape
        keep = keep and any(ctx.needs_input_grad) and n * T * T // 2 <= KEPT_PROBABILITIES
        out, largest, kept = _attend(q_nTd, k_nTd, v_nTV, starts_nT, scale, with_max, keep)
        ctx.save_for_backward(q_nTd, k_nTd, v_nTV, starts_nT, *kept)
        ctx.scale, ctx.size = scale, _group_size(T)
        ctx.mark_non_differentiable(largest)
        return out, largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts, *kept = ctx.saved_tensors
        scale, mask = ctx.scale, _mask(q)
        wide_q, wide_k = (q, k) if kept else (_wide(q), _wide(k))
        grad_q = torch.empty_like(q)
        # Summed over blocks, hence in fp32 at least.
        grad_k, grad_v = torch.zeros_like(_wide(k)), torch.zeros_like(_wide(v))
        for i, block in enumerate(_blocks(q.shape[0], q.shape[1], ctx.size, starts)):
            group, start, stop, first = block
            p = kept[i] if kept else _logits(wide_q, wide_k, mask, starts, block, scale).softmax(-1).to(v.dtype)
            grad_rows = grad[group, start:stop]
            grad_p = torch.bmm(grad_rows, v[group, first:stop].transpose(1, 2))
            grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[group, start:stop] = torch.baddbmm(q[:1, :1, :1], grad_s, k[group, first:stop], beta=0, alpha=scale)
            _add_bmm(grad_k[group, first:stop], grad_s.transpose(1, 2), q[group, start:stop], scale)
            _add_bmm(grad_v[group, first:stop], p.transpose(1, 2), grad_rows, 1.0)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def _group_size(length: int) -> int:
    """Sequences whose blocks are computed at once."""
    return max(1, torch.get_num_threads() * BLOCK // (min(ROWS, length) * length))


def _mask(q_nTd: Tensor) -> Tensor:
    """What hides the keys after a query, for the rows of a block [R, R]."""
    rows = min(ROWS, q_nTd.shape[1])
    return _wide(q_nTd).new_full((rows, rows), float("-inf")).triu_(1)


def _wide(x: Tensor) -> Tensor:
    """x in fp32 at least. A logit of 130 in bf16 is off by up to 0.5, and so would be its place in the softmax."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _add_bmm(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """``total += scale * a @ b`` where a and b may be of a narrower dtype than total."""
    if a.dtype == total.dtype:
        total.baddbmm_(a, b, alpha=scale)
    else:
        total.add_(torch.bmm(a, b), alpha=scale)


def block_attention(
    q_BHTd: Tensor,
    k_BHTd: Tensor,
    v_BHTV: Tensor,
    starts_BT: Tensor | None,
    *,
    scale: float,
    with_max: bool,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention and each head's largest logit.

    Args:
        q_BHTd: queries, on a CPU.
        k_BHTd: keys.
        v_BHTV: values.
        starts_BT: the first key that a query sees; None for 0.
        scale: of the logits, positive.
        with_max: whether the maxima are wanted; they are -inf otherwise.
        keep: whether probabilities may be kept for the backward pass, up to ``KEPT_PROBABILITIES``.

    Returns:
        out [B, H, T, V] and the exact maxima [H] fp32.
    """
    B, H, T, _ = q_BHTd.shape
    q, k, v = q_BHTd.flatten(0, 1), k_BHTd.flatten(0, 1), v_BHTV.flatten(0, 1)
    starts = None if starts_BT is None else starts_BT.repeat_interleave(H, 0)
    out, maxima = _BlockAttention.apply(q, k, v, starts, scale, with_max, keep)  # type: ignore[no-untyped-call]
    return out.view(B, H, T, -1), maxima.view(B, H).amax(0).float()
