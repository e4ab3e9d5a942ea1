"""Orthogonalisation by Newton-Schulz iteration: the step from momentum to Muon's update.

Shapes: ... any batch of matrices, m rows, n columns.

For X = U S V^T the iteration X <- a X + b (X X^T) X + c (X X^T)^2 X acts on each singular value alone and drives it
towards 1, so that the result approximates U V^T, the nearest matrix with orthonormal rows (or columns). Only matrix
products are needed, which is why it beats a singular value decomposition on any accelerator.
"""

from __future__ import annotations

import torch
from torch import Tensor

# a, b, c of Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/, also Moonlight, arXiv 2502.16982, and
# Kimi K2): steep at zero, at the price that singular values end between about 0.7 and 1.2 instead of at 1.
QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrices: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.float32, eps: float = 1e-7) -> Tensor:
    """Orthogonalises each matrix of a batch.

    Args:
        matrices: [..., m, n], any floating dtype.
        steps: iterations.
        dtype: in which the products are computed: float32 for exactness, bfloat16 for speed on a GPU.
        eps: added to the norm, so that a matrix of zeros gives zeros.

    Returns:
        [..., m, n] of ``dtype``, singular values near 1.
    """
    a, b, c = QUINTIC
    # The norm bounds the largest singular value; taken before the cast, where small entries are not yet lost.
    norm = torch.linalg.matrix_norm(matrices.float(), keepdim=True)
    x: Tensor = (matrices / (norm + eps)).to(dtype)
    wide = x.shape[-2] > x.shape[-1]  # the products are cheaper with the shorter side in front
    x = x.mT if wide else x
    if x.ndim == 2:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    else:
        shape, x = x.shape, x.flatten(0, -3)
        for _ in range(steps):
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        x = x.view(shape)
    return x.mT if wide else x


def cost(rows: int, columns: int, *, steps: int = 5) -> int:
    """Multiply-adds of ``newton_schulz`` on one matrix."""
    short, long = sorted((rows, columns))
    return steps * (2 * short * short * long + short**3)
