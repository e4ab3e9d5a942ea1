"""Matrices cut over ranks: which rank holds which interval, and the exchange that brings each one together once.

A flat tensor is cut into one shard a rank (as ZeRO does), without regard to where a parameter ends. Elementwise work
happens on the shards; Newton-Schulz needs whole matrices. A matrix that lies on one rank is worked on there. One that
straddles ranks is sent to one of its holders, which hands the pieces of the result back: two all-to-alls a step, and
every matrix is orthogonalised once in all. One process is the trivial layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.ownership import assign_owners


@dataclass(frozen=True)
class Piece:
    """An interval of a parameter in a rank's flat shard."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter, as the members of the layout's group see it
    start: int  # first element of the interval in the flattened parameter
    stop: int
    offset: int  # of ``start`` in the shard


@dataclass(frozen=True)
class FlatLayout:
    """Where everything lies in a flat tensor that is cut over the ranks of a group. Padding is in no piece."""

    pieces_by_rank: tuple[tuple[Piece, ...], ...]
    rank: int  # of this process in the group
    group: dist.ProcessGroup | None  # None: one process


@dataclass(frozen=True)
class _Part:
    rank: int
    start: int  # in the flattened matrix
    stop: int
    offset: int  # in that rank's shard


@dataclass
class _Matrix:
    name: str  # of the parameter
    number: int  # in it: a stack or a split parameter has several
    rows: int
    columns: int
    parts: list[_Part] = field(default_factory=list)
    owner: int = -1


class Exchange:
    """The plan of a layout: which matrices this rank owns, and what goes from whom to whom."""

    def __init__(
        self, layout: FlatLayout, *, cost: Callable[[int, int], float], split: Mapping[str, Sequence[int]]
    ) -> None:
        """Computes the plan; every rank comes to the same one.

        Args:
            layout: who holds what.
            cost: of the work on a matrix, from its rows and columns.
            split: by name of a parameter, the rows of the matrices that lie one after the other in it.

        Raises:
            ValueError: a parameter is no matrix and no stack of matrices, or the ranks do not hold all of one.
        """
        self._layout = layout
        self._matrices = _matrices(layout, split)
        owners = assign_owners(
            [cost(m.rows, m.columns) for m in self._matrices],
            [sorted({part.rank for part in m.parts}) for m in self._matrices],
            ranks=len(layout.pieces_by_rank),
        )
        for matrix, owner in zip(self._matrices, owners, strict=True):
            matrix.owner = owner
        # Every rank enters the collective, even with nothing to send, if any matrix of the group moves.
        self._moves = any(len({part.rank for part in m.parts}) > 1 for m in self._matrices)

    @property
    def owned(self) -> list[tuple[str, int]]:
        """The matrices that this rank orthogonalises, in the order of ``apply``: parameter, and number in it."""
        return [(m.name, m.number) for m in self._matrices if m.owner == self._layout.rank]

    def apply(self, values: Tensor, function: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
        """Applies a function of whole matrices to a shard; called by all ranks of the group together.

        Args:
            values: this rank's shard, 1-D.
            function: from the matrices that this rank owns, [m, n] each, to as many of the same shapes.

        Returns:
            A shard with the results; zeros where no piece lies.
        """
        rank = self._layout.rank
        owned = [m for m in self._matrices if m.owner == rank]
        received = self._send(values, to_owner=True)
        inputs = []
        for matrix in owned:
            if len(matrix.parts) == 1:
                part = matrix.parts[0]
                flat = values[part.offset : part.offset + part.stop - part.start]
            else:
                flat = values.new_empty(matrix.rows * matrix.columns)
                for part in matrix.parts:
                    length = part.stop - part.start
                    if part.rank == rank:
                        flat[part.start : part.stop] = values[part.offset : part.offset + length]
                    else:
                        flat[part.start : part.stop] = received[part.rank].take(length)
            inputs.append(flat.view(matrix.rows, matrix.columns))
        results = [result.reshape(-1) for result in function(inputs)]
        out = torch.zeros_like(values)
        for matrix, result in zip(owned, results, strict=True):
            for part in matrix.parts:
                if part.rank == rank:
                    out[part.offset : part.offset + part.stop - part.start] = result[part.start : part.stop]
        self._hand_back(owned, results, out)
        return out

    def _hand_back(self, owned: Sequence[_Matrix], results: Sequence[Tensor], out: Tensor) -> None:
        whole = {id(matrix): result for matrix, result in zip(owned, results, strict=True)}
        received = self._send(out, to_owner=False, whole=whole)
        for matrix in self._matrices:
            for part in matrix.parts:
                if part.rank == self._layout.rank != matrix.owner:
                    length = part.stop - part.start
                    out[part.offset : part.offset + length] = received[matrix.owner].take(length).to(out.dtype)

    def _send(self, shard: Tensor, *, to_owner: bool, whole: dict[int, Tensor] | None = None) -> list[_Buffer]:
        """Sends every part that is not at its owner there, or back. What arrives comes in the order of the plan."""
        rank, ranks = self._layout.rank, len(self._layout.pieces_by_rank)
        if not self._moves:
            return []
        outgoing: list[list[Tensor]] = [[] for _ in range(ranks)]
        arriving = [0] * ranks
        for matrix in self._matrices:
            for part in matrix.parts:
                if part.rank == matrix.owner:
                    continue
                source, target = (part.rank, matrix.owner) if to_owner else (matrix.owner, part.rank)
                length = part.stop - part.start
                if source == rank:
                    found = (
                        shard[part.offset : part.offset + length]
                        if whole is None
                        else whole[id(matrix)][part.start : part.stop]
                    )
                    outgoing[target].append(found.to(shard.dtype))
                elif target == rank:
                    arriving[source] += length
        sizes = [sum(map(len, parts)) for parts in outgoing]
        flat = [part for parts in outgoing for part in parts]
        buffer = torch.cat(flat) if flat else shard.new_empty(0)
        received = shard.new_empty(sum(arriving))
        dist.all_to_all_single(received, buffer, arriving, sizes, group=self._layout.group)
        return [_Buffer(part) for part in torch.split(received, arriving)]


class _Buffer:
    """What one rank sent, to be taken from the front."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._position = values, 0

    def take(self, length: int) -> Tensor:
        self._position += length
        return self._values[self._position - length : self._position]


def _matrices(layout: FlatLayout, split: Mapping[str, Sequence[int]]) -> list[_Matrix]:
    """All matrices of a layout with their parts, in an order that every rank finds."""
    found: dict[tuple[str, int], _Matrix] = {}
    for rank, pieces in enumerate(layout.pieces_by_rank):
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
                        part = _Part(rank, start - begin, stop - begin, piece.offset + start - piece.start)
                        number = index * len(blocks) + block
                        matrix = _Matrix(piece.name, number, block_rows, columns)
                        found.setdefault((piece.name, number), matrix).parts.append(part)
    for (name, number), matrix in found.items():
        matrix.parts.sort(key=lambda part: part.start)
        edges = [0, *(part.stop for part in matrix.parts)]
        if edges[:-1] != [part.start for part in matrix.parts] or edges[-1] != matrix.rows * matrix.columns:
            raise ValueError(f"the pieces of matrix {number} of {name} do not cover it once: {edges}")
    return [found[key] for key in sorted(found)]
