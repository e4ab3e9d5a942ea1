"""Who orthogonalises what: a pure function of costs and holders, without torch, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

GRAM_RATIO = 3  # long side over short side from which Newton-Schulz in its Gram form pays: at 2 it does not
FIRST_RESTART, RESTART_EVERY = 2, 3  # steps of the Gram form before its first restart, and between later ones


def uses_gram(rows: int, columns: int) -> bool:
    """Whether a matrix of this shape is computed in the Gram form if that is asked for."""
    return max(rows, columns) >= GRAM_RATIO * min(rows, columns)


def gram_segments(steps: int) -> list[range]:
    """The steps between restarts of the Gram form."""
    edges = [0, *range(min(FIRST_RESTART, steps), steps, RESTART_EVERY), steps]
    return [range(start, stop) for start, stop in pairwise(edges)]


def newton_schulz_cost(rows: int, columns: int, *, steps: int = 5, gram: bool = False) -> int:
    """Multiply-adds of Newton-Schulz on one matrix.

    Plain, a step is two products of the long kind and one of the short. In the Gram form, where it is used, a segment
    between restarts is two of the long kind, and of the short kind four a step but three fewer in all (see
    ``muonclip.orthogonalize``).
    """
    short, long = sorted((rows, columns))
    if gram and uses_gram(rows, columns):
        segments = gram_segments(steps)
        return 2 * len(segments) * short * short * long + (4 * steps - 3 * len(segments)) * short**3
    return steps * (2 * short * short * long + short**3)


def assign_owners(costs: Sequence[float], holders: Sequence[Sequence[int]], *, ranks: int) -> list[int]:
    """One owner for each matrix, among the ranks that hold a part of it.

    A matrix that lies on one rank stays there. The others, dearest first, go each to the least loaded of its holders
    (the lowest rank on a tie), so that what must move anyway evens out the load.

    Args:
        costs: of each matrix, in any unit.
        holders: ranks that hold a part of each matrix, at least one.
        ranks: how many there are.

    Returns:
        The owner of each matrix.
    """
    load = [0.0] * ranks
    owners = [-1] * len(costs)
    for matrix, held_by in enumerate(holders):
        if len(held_by) == 1:
            owners[matrix] = held_by[0]
            load[held_by[0]] += costs[matrix]
    for matrix in sorted(range(len(costs)), key=lambda m: (-costs[m], m)):
        if owners[matrix] < 0:
            owners[matrix] = min(holders[matrix], key=lambda rank: (load[rank], rank))
            load[owners[matrix]] += costs[matrix]
    return owners
