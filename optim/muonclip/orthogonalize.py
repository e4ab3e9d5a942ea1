"""Orthogonalisation by Newton-Schulz iteration: the step from momentum to Muon's update.

Shapes: ... any batch of matrices, m rows, n columns.

For X = U S V^T a step X <- a X + b (X X^T) X + c (X X^T)^2 X acts on each singular value alone and drives it towards 1,
so that the result approximates U V^T, the nearest matrix with orthonormal rows (or columns). Only matrix products are
needed, which is why it beats a singular value decomposition on any accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from muonclip.ownership import gram_segments, uses_gram

Coefficients = Sequence[tuple[float, float, float]]  # a, b, c of each step

# Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/), also in Moonlight (arXiv 2502.16982) and Kimi K2
# (arXiv 2507.20534): steep at zero, at the price that singular values end between about 0.7 and 1.2 instead of at 1.
QUINTIC: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5

# The Polar Express (arXiv 2505.16932, algorithm 1): its first five polynomials, each the best one for what the one
# before leaves of singular values from 1e-3 to 1, with the paper's margin for rounding: s / 1.01 for s.
POLAR_EXPRESS: Coefficients = tuple(
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
)

# Elements of one batch: what a stack needs on top of its matrices is bounded, yet enough to fill a device.
BATCH_ELEMENTS = 2**24
# The same for each thread of a CPU: small matrices share one call, and what they need stays in a core's cache.
BATCH_ELEMENTS_OF_A_THREAD = 2**17
# Elements of a matrix up to which float32 begins in float64. A step multiplies what rounding has put where the singular
# values are zero by 3.4, five steps by 485: by then an entry near 1 is off by 3e-5. The larger a matrix, the smaller
# are its entries, and their rounding.
WIDE_ELEMENTS = 2**16


def newton_schulz(
    matrices: Tensor,
    *,
    coefficients: Coefficients = QUINTIC,
    dtype: torch.dtype = torch.float32,
    gram: bool = False,
) -> Tensor:
    """Orthogonalises each matrix of a batch.

    The result does not depend on the scale of a matrix, down to the smallest and up to the largest normal number of
    ``matrices``' dtype (torch.optim.Muon shrinks what has a norm below 1e-7). A matrix of zeros gives zeros. What is
    not finite gives NaN.

    Args:
        matrices: [..., m, n], any floating dtype.
        coefficients: a, b, c of each step.
        dtype: in which the products are computed: float32 for exactness, bfloat16 for speed. On a GPU float32 is
            exact only while ``torch.get_float32_matmul_precision()`` is "highest", which is torch's default. On a CPU
            without bfloat16 products, bfloat16 gives the same numbers by way of float32, and no speed.
        gram: iterate on X X^T where one side is at least three times the other: fewer multiplications, less
            accurate for small singular values. Other matrices are computed as without it.

    Returns:
        [..., m, n] of ``dtype``, singular values near 1; new memory.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]  # the products are cheaper with the shorter side in front
    matrices = matrices.mT if tall else matrices
    shape = matrices.shape
    by_gram = gram and uses_gram(*shape[-2:])
    if not by_gram and _begins_wide(matrices, dtype):
        x = _first_step_wide(_normalised(matrices.double()), coefficients[0])
        coefficients = coefficients[1:]
    else:
        x = _normalised(matrices).to(dtype)
    x = x if x.ndim == 2 else x.flatten(0, -3)
    rounded = dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_multiplies_bfloat16()
    x = x.float() if rounded else x
    iterate = _iterate_gram if by_gram else _iterate
    x = iterate(x, coefficients, _through_bfloat16 if rounded else _as_it_is).to(dtype).view(shape)
    return x.mT if tall else x


def orthogonalize_each(
    matrices: Sequence[Tensor], *, coefficients: Coefficients, dtype: torch.dtype, gram: bool = False
) -> list[Tensor]:
    """``newton_schulz`` of many matrices, in batches of equal shapes.

    Small matrices gain most: alone, each of their products is too short to pay for its call, let alone to be shared out
    over threads. A matrix that fills a batch goes alone, as a batch of one, so that its result does not depend on its
    batch where that of a batched product does not (on a CPU; on a GPU it may, by rounding).

    Args:
        matrices: [m, n] each, of any shapes.
        coefficients: of ``newton_schulz``.
        dtype: of ``newton_schulz``.
        gram: of ``newton_schulz``.

    Returns:
        As many, of ``dtype``, in the same order.
    """
    results = list(matrices)
    alike: dict[tuple[torch.device, torch.Size], list[int]] = {}
    for number, matrix in enumerate(matrices):
        alike.setdefault((matrix.device, matrix.shape), []).append(number)
    for (device, shape), numbers in alike.items():
        on_cpu = device.type == "cpu"
        elements = BATCH_ELEMENTS_OF_A_THREAD * torch.get_num_threads() if on_cpu else BATCH_ELEMENTS
        size = max(1, elements // shape.numel())
        for batch in (numbers[i : i + size] for i in range(0, len(numbers), size)):
            together = matrices[batch[0]][None] if len(batch) == 1 else torch.stack([matrices[n] for n in batch])
            orthogonal = newton_schulz(together, coefficients=coefficients, dtype=dtype, gram=gram)
            for number, result in zip(batch, orthogonal, strict=True):
                results[number] = result
    return results


def _begins_wide(matrices: Tensor, dtype: torch.dtype) -> bool:
    small = matrices.shape[-2:].numel() <= WIDE_ELEMENTS
    return small and dtype == torch.float32 and matrices.device.type in ("cpu", "cuda")  # others lack float64


def _first_step_wide(x: Tensor, abc: tuple[float, float, float]) -> Tensor:
    """One step in float32, but for the product that decides how exact small singular values are.

    Rounding of X X^T and of the polynomial mixes singular vectors with each other, which later steps leave as it is.

    Args:
        x: float64, as for ``_iterate``, with any number of leading dimensions.
        abc: of the step.
    """
    a, b, c = abc
    narrow = x.float()
    gram = narrow @ narrow.mT
    polynomial = (gram @ gram).mul_(c).add_(gram, alpha=b)
    return (polynomial.double() @ x).add_(x, alpha=a).float()


def _iterate(x: Tensor, coefficients: Coefficients, round_: Callable[[Tensor], Tensor]) -> Tensor:
    """The steps as they are written above.

    Args:
        x: [m, n] or [batch, m, n] with m <= n, Frobenius norms at most 1.
        coefficients: a, b, c of each step.
        round_: what is done to every product.
    """
    for a, b, c in coefficients:
        gram = round_(x @ x.mT)
        polynomial = round_(_multiply_add(gram, gram, gram, beta=b, alpha=c))
        x = round_(_multiply_add(x, polynomial, x, beta=a))
    return x


def _iterate_gram(x: Tensor, coefficients: Coefficients, round_: Callable[[Tensor], Tensor]) -> Tensor:
    """The same polynomial on R = X X^T (Gram Newton-Schulz, https://tridao.me/blog/2026/gram-newton-schulz/).

    With P = b R + c R^2 a step is X <- (a I + P) X, hence R <- (a I + P) R (a I + P): m x m products alone. The factors
    are gathered in Q, and X <- Q X is multiplied out at a restart and at the end. Without a restart the rounding errors
    of R, which are those of the largest singular value, swamp the squares of the small ones while Q grows: in bfloat16
    the result explodes. The first restart comes after two steps, as there, the next ones after every three.

    Args:
        x: as for ``_iterate``.
        coefficients: a, b, c of each step.
        round_: what is done to every product.
    """
    for segment in gram_segments(len(coefficients)):
        gram = round_(x @ x.mT)
        factor = None
        for step in segment:
            a, b, c = coefficients[step]
            polynomial = round_(_multiply_add(gram, gram, gram, beta=b, alpha=c))
            if step != segment[-1]:
                half = round_(_multiply_add(gram, gram, polynomial, beta=a))
                gram = round_(_multiply_add(half, polynomial, half, beta=a))
            if factor is None:
                polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
                factor = round_(polynomial)
            else:
                factor = round_(_multiply_add(factor, factor, polynomial, beta=a))
        assert factor is not None, "no segment is empty"
        x = round_(factor @ x)
    return x


def _multiply_add(x: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """beta x + alpha left right, rounded once."""
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    return multiply_add(x, left, right, beta=beta, alpha=alpha)


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether torch has bfloat16 products for this CPU; what it falls back to otherwise is over ten times slower."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # what torch's own compiler asks
    return supported is not None and bool(supported())


def _as_it_is(product: Tensor) -> Tensor:
    return product


def _through_bfloat16(product: Tensor) -> Tensor:
    """Rounds a product of bfloat16 numbers that was computed in float32, in place: what a bfloat16 product gives."""
    return product.copy_(product.bfloat16())


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
