"""Orthogonalisation by Newton-Schulz iteration: the step from momentum to Muon's update.

Shapes: ... any batch of matrices, m rows, n columns.

For X = U S V^T the iteration X <- a X + b (X X^T) X + c (X X^T)^2 X acts on each singular value alone and drives it
towards 1, so that the result approximates U V^T, the nearest matrix with orthonormal rows (or columns). Only matrix
products are needed, which is why it beats a singular value decomposition on any accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# a, b, c of Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/, also Moonlight, arXiv 2502.16982, and
# Kimi K2): steep at zero, at the price that singular values end between about 0.7 and 1.2 instead of at 1.
QUINTIC = (3.4445, -4.7750, 2.0315)

# Elements of one batch: what a stack needs on top of its matrices is bounded, yet enough to fill a device.
BATCH_ELEMENTS = 2**24
# On a CPU, elements of a matrix above which a batch is no faster than its matrices one by one.
SMALL_ELEMENTS = 2**16


def newton_schulz(matrices: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Orthogonalises each matrix of a batch.

    The result does not depend on the scale of a matrix, down to the smallest and up to the largest normal number of
    ``matrices``' dtype (torch.optim.Muon shrinks what has a norm below 1e-7). A matrix of zeros gives zeros. What is
    not finite gives NaN.

    Args:
        matrices: [..., m, n], any floating dtype.
        steps: iterations, at least 1.
        dtype: in which the products are computed: float32 for exactness, bfloat16 for speed. On a GPU float32 is
            exact only while ``torch.get_float32_matmul_precision()`` is "highest", which is torch's default.

    Returns:
        [..., m, n] of ``dtype``, singular values near 1; new memory.
    """
    a, b, c = QUINTIC
    x = _normalised(matrices).to(dtype)
    tall = x.shape[-2] > x.shape[-1]  # the products are cheaper with the shorter side in front
    x = x.mT if tall else x
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
    return x.mT if tall else x


def orthogonalize_each(matrices: Sequence[Tensor], *, steps: int, dtype: torch.dtype) -> list[Tensor]:
    """``newton_schulz`` of many matrices, in batches of equal shapes where that is faster.

    On a CPU that is bfloat16 and small matrices (up to three times faster); float32 goes one by one there (batches
    cost 10 to 25 %), so that no batch, and no cut over ranks, changes a bit of a matrix's result. On other devices
    everything is batched.

    Args:
        matrices: [m, n] each, of any shapes.
        steps: iterations.
        dtype: in which they are computed.

    Returns:
        As many, of ``dtype``, in the same order.
    """
    results = list(matrices)
    alike: dict[tuple[torch.device, torch.Size], list[int]] = {}
    for number, matrix in enumerate(matrices):
        alike.setdefault((matrix.device, matrix.shape), []).append(number)
    for (device, shape), numbers in alike.items():
        alone = device.type == "cpu" and (dtype != torch.bfloat16 or shape.numel() > SMALL_ELEMENTS)
        size = 1 if alone else max(1, BATCH_ELEMENTS // shape.numel())
        for batch in (numbers[i : i + size] for i in range(0, len(numbers), size)):
            if len(batch) == 1:
                orthogonal = [newton_schulz(matrices[batch[0]], steps=steps, dtype=dtype)]
            else:
                orthogonal = list(newton_schulz(torch.stack([matrices[n] for n in batch]), steps=steps, dtype=dtype))
            for number, result in zip(batch, orthogonal, strict=True):
                results[number] = result
    return results


def _normalised(matrices: Tensor) -> Tensor:
    """Each matrix divided by its Frobenius norm, which bounds its largest singular value.

    Before any cast, where small entries are not yet lost, and in two steps: squares of entries far from 1 would leave
    the range of float32.
    """
    x: Tensor = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    smallest = torch.finfo(x.dtype).tiny
    # Twenty times faster on a CPU than the infinity norm.
    largest = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))
    x = x / largest.clamp_min(smallest)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x /= norm.clamp_min(smallest)
    return x
