"""What is where, and what goes from whom to whom: shapes and intervals alone, without torch, the same on every rank.

A flat tensor is cut into one shard a rank, as ZeRO does, without regard to where a parameter ends. ``cut`` says which
intervals lie on which rank; ``Plan`` gives each matrix an owner, and puts those that must travel into rounds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from muonclip.ownership import assign_owners

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """An interval of a parameter in a rank's flat shard."""

    name: str
    shape: Shape  # of the whole parameter, as the members of the layout's group see it
    start: int  # first element of the interval in the flattened parameter
    stop: int
    offset: int  # of ``start`` in the shard


def cut(parameters: Iterable[tuple[str, Shape, int]], *, ranks: int, size: int) -> tuple[tuple[Piece, ...], ...]:
    """The pieces on each rank of a flat tensor that is cut into equal shards.

    Args:
        parameters: name, shape, and offset in the whole flat tensor; elements that belong to none are padding.
        ranks: how many shards there are.
        size: elements of a shard.
    """
    pieces_by_rank: list[list[Piece]] = [[] for _ in range(ranks)]
    for name, shape, offset in parameters:
        stop = offset + math.prod(shape)
        for rank in range(offset // size, -(-stop // size)):
            low, high = max(offset, rank * size), min(stop, (rank + 1) * size)
            pieces_by_rank[rank].append(Piece(name, shape, low - offset, high - offset, low - rank * size))
    return tuple(map(tuple, pieces_by_rank))


@dataclass(frozen=True)
class Part:
    """An interval of a matrix in a rank's flat shard."""

    rank: int
    start: int  # in the flattened matrix
    stop: int
    offset: int  # of ``start`` in that rank's shard

    @property
    def length(self) -> int:
        """Elements."""
        return self.stop - self.start


@dataclass
class Matrix:
    """What is orthogonalised as one, at its owner."""

    name: str  # of the parameter
    number: int  # in it: a stack or a split parameter has several
    rows: int
    columns: int
    parts: list[Part] = field(default_factory=list)
    owner: int = -1

    @property
    def travels(self) -> bool:
        """Whether its owner lacks a part of it."""
        return any(part.rank != self.owner for part in self.parts)


@dataclass(frozen=True)
class Traffic:
    """Of one rank and one step, in elements."""

    sent: int  # parts to owners, and results back
    received: int
    buffers: int  # held at most at one time


class Plan:
    """Owners of the matrices of a layout, and the rounds in which their parts travel."""

    def __init__(
        self,
        pieces_by_rank: Sequence[Sequence[Piece]],
        *,
        cost: Callable[[int, int], float],
        split: Mapping[str, Sequence[int]],
        buffer_elements: int,
        load: Sequence[float] | None = None,
        relief: Sequence[int] | None = None,
    ) -> None:
        """Makes the plan; every rank comes to the same one.

        Args:
            pieces_by_rank: who holds what.
            cost: of the work on a matrix, from its rows and columns.
            split: by name of a parameter, the rows of the matrices that lie one after the other in it.
            buffer_elements: that a rank may hold of parts under way. A matrix that needs more travels alone.
            load: of each rank, the cost of what it does in other plans.
            relief: see ``assign_owners``.

        Raises:
            ValueError: a parameter is no matrix and no stack of matrices, or the ranks do not hold all of one.
        """
        self.ranks = len(pieces_by_rank)
        self.matrices = _matrices(pieces_by_rank, split)
        costs = [cost(m.rows, m.columns) for m in self.matrices]
        owners = assign_owners(costs, [_held(m) for m in self.matrices], ranks=self.ranks, load=load, relief=relief)
        self.costs = [0.0] * self.ranks  # of the work of each rank
        for matrix, its_cost, owner in zip(self.matrices, costs, owners, strict=True):
            matrix.owner = owner
            self.costs[owner] += its_cost
        travelling = sorted(
            (number for number, m in enumerate(self.matrices) if m.travels), key=lambda n: (-costs[n], n)
        )
        # While a round is worked on, the next one's parts arrive and the last one's results are on their way.
        self.rounds = _rounds([self.matrices[number] for number in travelling], buffer_elements // 2)

    def local(self, rank: int) -> list[Matrix]:
        """The matrices that a rank owns and holds all of."""
        return [m for m in self.matrices if m.owner == rank and not m.travels]

    def traffic(self) -> list[Traffic]:
        """What each rank sends, receives and holds in a step."""
        sent, received, largest = ([0] * self.ranks for _ in range(3))
        for matrices in self.rounds:
            held: dict[int, int] = defaultdict(int)
            for matrix, part in travelling_parts(matrices):
                for source, target in ((part.rank, matrix.owner), (matrix.owner, part.rank)):
                    sent[source] += part.length
                    received[target] += part.length
                    held[source] += part.length
            for rank, elements in held.items():
                largest[rank] = max(largest[rank], elements)
        in_flight = min(2, len(self.rounds))
        return [Traffic(s, r, in_flight * b) for s, r, b in zip(sent, received, largest, strict=True)]


@dataclass(frozen=True)
class Task:
    """A layout that is to be planned."""

    pieces_by_rank: Sequence[Sequence[Piece]]
    members: Sequence[int]  # the number among all ranks of each rank of the layout
    cost: Callable[[int, int], float]  # of a matrix, from its rows and columns
    buffer_elements: int


def plan_together(
    tasks: Sequence[Task],
    *,
    split: Mapping[str, Sequence[int]],
    relief: Mapping[int, int],
    load: dict[int, float],
) -> list[Plan]:
    """Plans several layouts so that the work of each rank is even in sum.

    Those of more ranks come first. They take care that the others, whose ranks share out matrices among themselves
    alone, can even out the rest.

    Args:
        tasks: the layouts.
        split: see ``Plan``.
        relief: of each rank, the number of the smallest set of ranks in which it will share out work.
        load: of each rank, what it has to do already; what is planned here is added.

    Raises:
        ValueError: see ``Plan``.
    """
    plans: dict[int, Plan] = {}
    for number in sorted(range(len(tasks)), key=lambda n: -len(tasks[n].members)):
        task = tasks[number]
        sets = [relief.get(rank, 0) for rank in task.members]
        plan = plans[number] = Plan(
            task.pieces_by_rank,
            cost=task.cost,
            split=split,
            buffer_elements=task.buffer_elements,
            load=[load.get(rank, 0.0) for rank in task.members],
            relief=sets if len(set(sets)) > 1 else None,
        )
        for rank, cost in zip(task.members, plan.costs, strict=True):
            load[rank] = load.get(rank, 0.0) + cost
    return [plans[number] for number in range(len(tasks))]


def travelling_parts(matrices: Iterable[Matrix]) -> list[tuple[Matrix, Part]]:
    """What owners lack of their matrices, in an order that sender and receiver share."""
    return [(m, part) for m in matrices for part in m.parts if part.rank != m.owner]


def _held(matrix: Matrix) -> dict[int, int]:
    held: dict[int, int] = defaultdict(int)
    for part in matrix.parts:
        held[part.rank] += part.length
    return held


def _rounds(matrices: Iterable[Matrix], limit: int) -> list[list[Matrix]]:
    """Puts each matrix into the first round in which all ranks that it concerns have room, in the given order.

    Args:
        matrices: that travel.
        limit: elements that a rank may send and receive in a round; a matrix with more shares its round with none of
            that rank's.
    """
    rounds: list[list[Matrix]] = []
    place: dict[int, int] = defaultdict(int)  # the round that is being filled for each rank
    used: dict[int, int] = defaultdict(int)  # elements of that rank in it
    for matrix in matrices:
        elements: dict[int, int] = defaultdict(int)
        for _, part in travelling_parts([matrix]):
            elements[part.rank] += part.length
            elements[matrix.owner] += part.length
        first = max(place[rank] for rank in elements)
        full = any(place[r] == first and used[r] and used[r] + n > limit for r, n in elements.items())
        number = first + full
        for rank, count in elements.items():
            used[rank] = count + (used[rank] if place[rank] == number else 0)
            place[rank] = number
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(matrix)
    return rounds


def _matrices(pieces_by_rank: Sequence[Sequence[Piece]], split: Mapping[str, Sequence[int]]) -> list[Matrix]:
    """All matrices with their parts, in an order that every rank finds."""
    found: dict[tuple[str, int], Matrix] = {}
    for rank, pieces in enumerate(pieces_by_rank):
        for piece in pieces:
            if len(piece.shape) not in (2, 3):
                raise ValueError(
                    f"{piece.name} has shape {list(piece.shape)}: Muon takes matrices [m, n] and stacks of them "
                    "[E, m, n]; give it to a group with algorithm='adamw'"
                )
            rows, columns = piece.shape[-2:]
            size = rows * columns
            for index in range(piece.start // size, -(-piece.stop // size)):
                end, blocks = index * size, split.get(piece.name, (rows,))
                for block, block_rows in enumerate(blocks):
                    begin, end = end, end + block_rows * columns
                    start, stop = max(piece.start, begin), min(piece.stop, end)
                    if start < stop:
                        part = Part(rank, start - begin, stop - begin, piece.offset + start - piece.start)
                        number = index * len(blocks) + block
                        matrix = Matrix(piece.name, number, block_rows, columns)
                        found.setdefault((piece.name, number), matrix).parts.append(part)
    for (name, number), matrix in found.items():
        matrix.parts.sort(key=lambda part: part.start)
        edges = [0, *(part.stop for part in matrix.parts)]
        if edges[:-1] != [part.start for part in matrix.parts] or edges[-1] != matrix.rows * matrix.columns:
            held = ", ".join(f"rank {part.rank} [{part.start}, {part.stop})" for part in matrix.parts)
            raise ValueError(
                f"the pieces of matrix {number} of {name} must cover its {matrix.rows * matrix.columns} elements once, "
                f"but the layout says: {held}"
            )
    return [found[key] for key in sorted(found)]
