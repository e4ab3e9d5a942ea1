"""The largest attention logit of each head, in fp32: what QK-Clip (arXiv 2507.20534, section 2.1) reads.

Shapes: B batch, H heads, n = B*H, T tokens, d query and key dims, R rows of q. A logit is ``scale * q_i . k_j`` of a
visible pair: ``starts[i] <= j <= i``, where starts is the first key of the query's own document, 0 if there are none.
A NaN logit makes the head's maximum NaN, so that a broken run shows; no pair at all gives -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of q a block: 128 x 4096 fp32 logits of 16 heads are 32 MiB.
ROWS = 128
# Rows of q a sequence that max_logits_by_lse computes again. R rows are 2 R T d operations, attention forward and
# backward 5 T^2 d: 4 rows are 0.3 % of it at T = 512. Where logits are large, one or two hold the maximum.
CANDIDATES = 4
# A maximum counts as certified when the bound exceeds it by less than this share of it, which is 5e-4 at a logit of
# 130: a kernel's log-sum-exp in fp32 is rounded as well, and equal rows would else be certified by chance.
ROUNDING = 4e-6


def _logits(q_nRd: Tensor, k_nTd: Tensor) -> Tensor:
    """Unscaled products [n, R, T], fp32 at least. A product of two bf16 numbers is exact in fp32; their sum rounds."""
    k_ndT = k_nTd.transpose(1, 2)
    if q_nRd.dtype in (torch.float32, torch.float64):
        return torch.bmm(q_nRd, k_ndT)
    if q_nRd.is_cuda:
        return torch.bmm(q_nRd, k_ndT, out_dtype=torch.float32)
    return torch.bmm(q_nRd.float(), k_ndT.float())


def max_logits_by_blocks(q_BHTd: Tensor, k_BHTd: Tensor, starts_BT: Tensor | None = None, *, scale: float) -> Tensor:
    """The maxima by a pass of its own over all visible pairs, a block of rows at a time.

    For attention kernels that keep their logits to themselves. Nothing here depends on the data, so that a GPU's host
    never waits.

    Args:
        q_BHTd: queries.
        k_BHTd: keys.
        starts_BT: the first key that a query sees; None for 0.
        scale: of the softmax, positive.

    Returns:
        [H] fp32.
    """
    B, H, T, _ = q_BHTd.shape
    q, k = q_BHTd.flatten(0, 1), k_BHTd.flatten(0, 1)
    starts = None if starts_BT is None else starts_BT.repeat_interleave(H, 0)[:, :, None]
    largest = q.new_full((B, H), float("-inf"), dtype=torch.float32)
    keys = torch.arange(T, device=q.device)
    for start in range(0, T, ROWS):
        stop = min(start + ROWS, T)
        logits = _logits(q[:, start:stop], k[:, :stop])
        logits[:, :, start:].masked_fill_(keys[start:stop] > keys[start:stop, None], float("-inf"))
        if starts is not None:
            logits.masked_fill_(keys[:stop] < starts[:, start:stop], float("-inf"))
        largest = torch.maximum(largest, logits.amax((1, 2)).view(B, H))
    return largest.amax(0) * scale


def max_logits_by_lse(
    q_BHTd: Tensor,
    k_BHTd: Tensor,
    lse_BHT: Tensor,
    starts_BT: Tensor | None = None,
    *,
    scale: float,
    candidates: int = CANDIDATES,
) -> tuple[Tensor, Tensor]:
    """The maxima from the log-sum-exp that a flash kernel returns, at the price of a few rows of q.

    A row's largest logit lies between ``lse - log(keys that it sees)`` and ``lse``. The rows of the largest lse in each
    sequence are computed again in fp32; every other row stays below the largest lse that is left, which bounds the
    head. Where that is not above the maximum found, the maximum is exact: so it is for a head with large logits, whose
    softmax is peaked. The number of rows is fixed, and nothing waits for the data.

    Args:
        q_BHTd: queries.
        k_BHTd: keys.
        lse_BHT: natural logarithm of the sum of the exponentials of each query's visible logits.
        starts_BT: the first key that a query sees; None for 0.
        scale: of the softmax, positive.
        candidates: rows a sequence and head.

    Returns:
        Two of [H] in fp32: the largest logit found, and a number that no visible logit exceeds. Where the two are equal
        the former is the maximum (within ``ROUNDING`` of it).
    """
    B, H, T, _ = q_BHTd.shape
    top = lse_BHT.detach().float().topk(min(candidates + 1, T), dim=-1)
    rows = top.indices[:, :, :candidates]
    q = q_BHTd.gather(2, rows[..., None].expand(-1, -1, -1, q_BHTd.shape[-1]))
    logits = _logits(q.flatten(0, 1), k_BHTd.flatten(0, 1)).view(B, H, -1, T)
    keys = torch.arange(T, device=q.device)
    hidden = keys > rows[..., None]
    if starts_BT is not None:
        hidden |= keys < starts_BT[:, None].expand(-1, H, -1).gather(2, rows)[..., None]
    found = logits.masked_fill_(hidden, float("-inf")).amax((0, 2, 3)).float() * scale
    if candidates >= T:
        return found, found
    rest = top.values[:, :, candidates].amax(0)
    certified = rest <= found + ROUNDING * found.abs()
    return found, torch.where(certified, found, torch.maximum(found, rest))
