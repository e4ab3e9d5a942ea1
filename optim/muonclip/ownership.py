"""Who orthogonalises what: a pure function of costs and holders, without torch, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence


def newton_schulz_cost(rows: int, columns: int, *, steps: int = 5) -> int:
    """Multiply-adds of Newton-Schulz on one matrix: two products of the long kind and one of the short, a step."""
    short, long = sorted((rows, columns))
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
