"""The largest attention logit of each head, exact in fp32: what QK-Clip (arXiv 2507.20534, section 2.1) reads.

Shapes: B batch, H heads, T tokens, d query and key dims. A logit is ``scale * q_i . k_j`` of a visible pair (j <= i).
A NaN logit makes the head's maximum NaN, so that a broken run shows; no pair at all gives -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of q a block: 128 x 4096 fp32 logits of 16 heads are 32 MiB.
ROWS = 128


def _logits(q_nRd: Tensor, k_nTd: Tensor) -> Tensor:
    """Unscaled fp32 products [n, R, T]. Products of two bf16 numbers are exact in fp32; only their sum rounds."""
    k_ndT = k_nTd.transpose(1, 2)
    if q_nRd.dtype == torch.float32:
        return torch.bmm(q_nRd, k_ndT)
    if q_nRd.is_cuda:
        return torch.bmm(q_nRd, k_ndT, out_dtype=torch.float32)
    return torch.bmm(q_nRd.float(), k_ndT.float())


def max_logits_by_blocks(q_BHTd: Tensor, k_BHTd: Tensor, *, scale: float) -> Tensor:
    """The maxima by a pass of its own over all visible pairs, a block of rows at a time.

    For attention kernels that keep their logits to themselves. Nothing here depends on the data, so that a GPU's host
    never waits.

    Args:
        q_BHTd: queries.
        k_BHTd: keys.
        scale: of the softmax, positive.

    Returns:
        [H] fp32.
    """
    B, H, T, _ = q_BHTd.shape
    q, k = q_BHTd.flatten(0, 1), k_BHTd.flatten(0, 1)
    largest = q.new_full((B, H), float("-inf"), dtype=torch.float32)
    hidden = torch.ones(min(ROWS, T), min(ROWS, T), dtype=torch.bool, device=q.device).triu_(1)
    for start in range(0, T, ROWS):
        stop = min(start + ROWS, T)
        logits = _logits(q[:, start:stop], k[:, :stop])
        logits[:, :, start:].masked_fill_(hidden[: stop - start, : stop - start], float("-inf"))
        largest = torch.maximum(largest, logits.amax((1, 2)).view(B, H))
    return largest.amax(0) * scale
