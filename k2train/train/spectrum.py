"""How many directions the weights use: the entropy of their singular values.

Of a matrix with singular values s, ``- sum p log p / log K`` with ``p = s^2 / sum s^2`` over the K of them: 1 where all
are equal, 0 where there is one (Moonlight, arXiv 2502.16982, section 3.4, "SVD entropy").
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.config import MUON_ROLES
from k2train.train.state import RunState


def svd_entropy(matrix: Tensor) -> float:
    """From 0 to 1, of [m, n]; NaN of what is not finite, or has a single row or column.

    The squares of the singular values are the eigenvalues of the smaller product with the transposed: in float64 that
    is exact enough, and cheaper than to decompose the matrix.
    """
    if min(matrix.shape) < 2 or not matrix.isfinite().all():
        return math.nan
    short = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()).double()
    squares = torch.linalg.eigvalsh(short @ short.t()).clamp_min(0)
    share = squares / squares.sum()
    return float(-torch.xlogy(share, share).sum() / math.log(len(share)))


@torch.no_grad()
def weight_entropies(state: RunState) -> dict[str, float]:
    """By parameter the mean over its matrices, with the experts of all processes; called by all ranks together.

    Each matrix is decomposed where it is orthogonalised: the work is shared out as that of Newton-Schulz.
    """
    names = [name for name, role in state.roles.items() if role in MUON_ROLES]
    place = {name: number for number, name in enumerate(names)}
    device = state.world.device
    sums = torch.zeros(2, len(names), dtype=torch.float64)  # of entropies, and how many
    for flat, group in state.optimizer.tensors():
        if group["role"] not in MUON_ROLES:
            continue
        exchange = state.optimizer.exchange(flat, group)
        matrices = exchange.whole(flat.detach().to(device, copy=True))
        for (name, _), matrix in zip(exchange.owned, matrices, strict=True):
            sums[:, place[name]] += torch.tensor([svd_entropy(matrix), 1.0], dtype=torch.float64)
    sums = sums.to(device)
    if state.world.size > 1:
        dist.all_reduce(sums)
    return dict(zip(names, (sums[0] / sums[1]).tolist(), strict=True))
