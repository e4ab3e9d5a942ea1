"""Who orthogonalises what: a pure function of costs and holders, without torch, the same on every rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import groupby, pairwise

GRAM_RATIO = 3  # long side over short side from which Newton-Schulz in its Gram form pays: at 2 it does not
FIRST_RESTART, RESTART_EVERY = 2, 3  # steps of the Gram form before its first restart, and between later ones

SLACK = 0.01  # of the load: how far above the mean a rank may be, so that matrices need not move for nothing


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


def assign_owners(
    costs: Sequence[float],
    holders: Sequence[Mapping[int, int]],
    *,
    ranks: int,
    load: Sequence[float] | None = None,
    relief: Sequence[int] | None = None,
) -> list[int]:
    """One owner for each matrix: loads even first, then as few elements moved as that allows.

    Dearest first, a matrix goes to the rank that holds most of it, as long as that keeps the rank below the limit: the
    mean load, or the dearest matrix, which nobody can halve, and ``SLACK``. Else it goes to its next holder that stays
    below it; else, once all that cost the same have tried, to the rank with the least load, which need not hold any of
    it. At last moves and swaps of single matrices relieve the most loaded rank, until it is below the limit or nothing
    helps.

    Args:
        costs: of each matrix, in any unit.
        holders: of each matrix, the elements that ranks hold of it; empty: it is at hand everywhere.
        ranks: how many there are.
        load: of each rank, what it has to do besides.
        relief: of each rank, the number of the set of ranks that will share out more work among them later, and so
            even out its own load: then the sums of these sets are balanced too. None: there is no later work.

    Returns:
        The owner of each matrix.
    """
    balance = _Balance(costs, load or [0.0] * ranks, relief)
    owners = [-1] * len(costs)
    by_size = [sorted(held, key=lambda rank: (-held[rank], rank)) for held in holders]
    # Of those that cost the same, the one that would move more elements chooses first.
    order = sorted(range(len(costs)), key=lambda m: (-costs[m], -max(holders[m].values(), default=0), m))
    for cost, alike in groupby(order, key=lambda m: costs[m]):
        left_over = []
        for matrix in alike:
            owner = next((rank for rank in by_size[matrix] if balance.has_room(rank, cost)), None)
            if owner is None:
                left_over.append(matrix)
            else:
                owners[matrix] = owner
                balance.add(owner, cost)
        for matrix in left_over:
            owners[matrix] = balance.lightest()
            balance.add(owners[matrix], cost)
    if relief is None:
        _relieve(balance, costs, holders, owners)
    return owners


class _Balance:
    """Loads of ranks, and of sets of ranks that relieve one another (without such sets each rank is one)."""

    def __init__(self, costs: Sequence[float], load: Sequence[float], relief: Sequence[int] | None) -> None:
        self.load = list(load)
        self._set_of = list(range(len(load))) if relief is None else list(relief)
        members: dict[int, list[int]] = defaultdict(list)
        for rank, number in enumerate(self._set_of):
            members[number].append(rank)
        self._set_load = {number: sum(load[rank] for rank in held) for number, held in members.items()}
        self._size = {number: len(held) for number, held in members.items()}
        mean, dearest = (sum(load) + sum(costs)) / len(load), max(costs, default=0.0)
        self.limit = (1 + SLACK) * max(mean, dearest)
        self._set_limit = {n: (1 + SLACK) * max(mean * size, dearest) for n, size in self._size.items()}
        # Lightest first. A changed load is pushed anew; its older entries are dropped when they come up.
        self._sets = [(self._set_load[number] / size, number) for number, size in self._size.items()]
        self._ranks = {number: [(load[rank], rank) for rank in held] for number, held in members.items()}
        for heap in (self._sets, *self._ranks.values()):
            heapify(heap)

    def has_room(self, rank: int, cost: float) -> bool:
        number = self._set_of[rank]
        fits_set = self._set_load[number] + cost <= self._set_limit[number]
        return fits_set and self.load[rank] + cost <= self.limit

    def add(self, rank: int, cost: float) -> None:
        number = self._set_of[rank]
        self.load[rank] += cost
        self._set_load[number] += cost
        heappush(self._sets, (self._set_load[number] / self._size[number], number))
        heappush(self._ranks[number], (self.load[rank], rank))

    def lightest(self) -> int:
        """The rank with the least load in the set with the least."""
        while self._sets[0][0] != self._set_load[self._sets[0][1]] / self._size[self._sets[0][1]]:
            heappop(self._sets)
        heap = self._ranks[self._sets[0][1]]
        while heap[0][0] != self.load[heap[0][1]]:
            heappop(heap)
        return heap[0][1]


def _relieve(
    balance: _Balance, costs: Sequence[float], holders: Sequence[Mapping[int, int]], owners: list[int]
) -> None:
    """Moves matrices from the most loaded rank to the least, or swaps two of them, while that makes them more even."""
    owned: list[dict[float, list[int]]] = [defaultdict(list) for _ in balance.load]  # by cost: there are few of them
    for matrix, owner in enumerate(owners):
        owned[owner][costs[matrix]].append(matrix)
    heaviest = [(-load, rank) for rank, load in enumerate(balance.load)]
    heapify(heaviest)

    def cheapest(matrices: Iterable[int], source: int, target: int) -> int:
        return min(matrices, key=lambda m: (holders[m].get(source, 0) - holders[m].get(target, 0), m))

    def move(matrix: int, source: int, target: int) -> None:
        owned[source][costs[matrix]].remove(matrix)
        owned[target][costs[matrix]].append(matrix)
        owners[matrix] = target
        for rank, change in ((source, -costs[matrix]), (target, costs[matrix])):
            balance.add(rank, change)
            heappush(heaviest, (-balance.load[rank], rank))

    for _ in costs:
        while -heaviest[0][0] != balance.load[heaviest[0][1]]:
            heappop(heaviest)
        source, target = heaviest[0][1], balance.lightest()
        gap = balance.load[source] - balance.load[target]
        # What a move, or a swap against a cheaper one, shifts; best is half the gap. Moves first: a swap is two.
        shifts = [(cost, cost, 0.0) for cost, found in owned[source].items() if found]
        returned = [cost for cost, found in owned[target].items() if found]
        shifts += [(cost - back, cost, back) for cost, _, _ in shifts for back in returned]
        useful = [shift for shift in shifts if 0 < shift[0] < gap]
        if balance.load[source] <= balance.limit or not useful:
            return
        _, cost, back = min(useful, key=lambda shift: abs(shift[0] - gap / 2))
        given = cheapest(owned[source][cost], source, target)
        swapped = cheapest(owned[target][back], target, source) if back else None
        move(given, source, target)
        if swapped is not None:
            move(swapped, target, source)
