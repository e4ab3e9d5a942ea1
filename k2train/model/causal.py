"""Causal softmax attention that also tells each head's largest logit.

Shapes: B batch, H heads, T tokens, d query and key dims, V value dims (V and d may differ). Documents packed into one
sequence are told by ``starts_BT``: query i sees the keys ``starts[i] <= j <= i``, those of its own document so far.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from k2train.model import kernels
from k2train.model.block_attention import block_attention
from k2train.model.max_logits import max_logits_by_blocks, max_logits_by_lse

# Kernels that return the log-sum-exp, by the name that `attention` takes.
LSE_KERNELS = {
    "flash_cpu": kernels.flash_cpu,
    "flash": kernels.flash,
    "efficient": kernels.efficient,
    "cudnn": kernels.cudnn,
}
BACKENDS = ("block", *LSE_KERNELS, "flex", "math")
_OF_TORCH = {
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
}


class MaxLogits(NamedTuple):
    """The largest logits of one call.

    Attributes:
        largest: [H] fp32, without gradient.
        fallbacks: how many heads' maxima the log-sum-exp did not tell, an integer on the device.
        found: [H] fp32, the largest logit that was seen itself; less than ``largest`` where that is an upper bound.
    """

    largest: Tensor
    fallbacks: Tensor
    found: Tensor


def choose_backend(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTV: Tensor, starts_BT: Tensor | None, *, scale: float) -> str:
    """The fastest kernel for these inputs: on a CPU always the block attention, on CUDA what torch itself would take.

    torch's choice knows the card, the dtype, the widths and who is differentiated, and heeds
    ``torch.nn.attention.sdpa_kernel``.

    Returns:
        One of ``BACKENDS``.
    """
    if q_BHTd.device.type == "cpu":
        return "block"
    if q_BHTd.device.type != "cuda":
        return "math"
    mask = None
    if starts_BT is not None:  # only whether there is a mask, and its shape, matter here
        B, T = starts_BT.shape
        mask = q_BHTd.new_empty(T).expand(B, 1, T, T)
    chosen = torch._fused_sdp_choice(q_BHTd, k_BHTd, v_BHTV, mask, 0.0, mask is None, scale=scale)
    return _OF_TORCH.get(chosen, "math")


def _from_lse(
    q_BHTd: Tensor, k_BHTd: Tensor, lse_BHT: Tensor, starts_BT: Tensor | None, *, scale: float, exact_above: float
) -> MaxLogits:
    found, bound = max_logits_by_lse(q_BHTd, k_BHTd, lse_BHT, starts_BT, scale=scale)
    # Written so that a NaN in the bound alone is unsure, and one among the logits found is an answer.
    unsure = ~((bound <= found) | (bound <= exact_above) | found.isnan())
    if not q_BHTd.is_cuda and bool(unsure.any()):
        bound[unsure] = max_logits_by_blocks(q_BHTd[:, unsure], k_BHTd[:, unsure], starts_BT, scale=scale)
        found = torch.where(unsure, bound, found)
    return MaxLogits(bound, unsure.sum(), found)


def attention(
    q_BHTd: Tensor,
    k_BHTd: Tensor,
    v_BHTV: Tensor,
    starts_BT: Tensor | None = None,
    *,
    scale: float,
    with_max: bool,
    exact_above: float = float("-inf"),
    keep: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, MaxLogits | None]:
    """``softmax(scale * q k^T) v`` over the visible pairs.

    The maxima are those of the logits in fp32, over the batch and all visible pairs, whatever dtype attention runs in.
    Back ends that see the logits (block, flex, math) always tell them exactly. From a log-sum-exp they follow exactly
    or as an upper bound (``max_logits_by_lse``). A bound of at most ``exact_above`` is reported as it is: such a head
    is healthy. Any other such head is a fallback: on a CPU its maximum is computed by a pass of its own, on CUDA,
    where looking would make the host wait, the bound is reported, and the head is clipped by too much at worst.

    Args:
        q_BHTd: queries.
        k_BHTd: keys.
        v_BHTV: values.
        starts_BT: int64, the first key that a query sees, 0 <= starts[i] <= i; None for 0.
        scale: of the logits, positive.
        with_max: whether the largest logits are wanted.
        exact_above: QK-Clip's tau, or less.
        keep: whether the block attention may keep probabilities for the backward pass, or has to make them again.
        backend: one of ``BACKENDS``; None for ``choose_backend``.

    Returns:
        out [B, H, T, V] and, if wanted, the maxima.

    Raises:
        ValueError: starts is not [B, T] of int64, or there is no such back end.
    """
    B, _, T, _ = q_BHTd.shape
    if starts_BT is not None and (starts_BT.shape != (B, T) or starts_BT.dtype != torch.int64):
        raise ValueError(
            f"starts is {list(starts_BT.shape)} of {starts_BT.dtype}, but must be [{B}, {T}] of int64: "
            "for every query the position of the first key that it sees"
        )
    name = backend or choose_backend(q_BHTd, k_BHTd, v_BHTV, starts_BT, scale=scale)
    if name not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, but must be one of {', '.join(BACKENDS)}, or None")
    none = torch.zeros((), dtype=torch.int64, device=q_BHTd.device)
    if name == "block":
        out, largest = block_attention(q_BHTd, k_BHTd, v_BHTV, starts_BT, scale=scale, with_max=with_max, keep=keep)
        return out, MaxLogits(largest, none, largest) if with_max else None
    if name == "flex":
        out, row_maxima = kernels.flex(q_BHTd, k_BHTd, v_BHTV, starts_BT, scale=scale)
        largest = row_maxima.detach().amax((0, 2)).float()
        return out, MaxLogits(largest, none, largest) if with_max else None
    if name == "math":
        mask = None if starts_BT is None else kernels.document_bias(q_BHTd, starts_BT)
        out = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTV, mask, is_causal=mask is None, scale=scale)
        with torch.no_grad():
            largest = max_logits_by_blocks(q_BHTd, k_BHTd, starts_BT, scale=scale) if with_max else none
        return out, MaxLogits(largest, none, largest) if with_max else None
    out, lse = LSE_KERNELS[name](q_BHTd, k_BHTd, v_BHTV, starts_BT, scale=scale)
    if not with_max:
        return out, None
    with torch.no_grad():
        return out, _from_lse(q_BHTd, k_BHTd, lse, starts_BT, scale=scale, exact_above=exact_above)
