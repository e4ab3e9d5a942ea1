"""The exchange that brings the matrices of flat shards together once, in rounds, while others are worked on.

Elementwise work happens on the shards; Newton-Schulz needs whole matrices. A matrix that lies at its owner is worked on
there. For the others the parts go to the owner and those of the result come back: two all-to-alls a round. While a
round is worked on, the next one's parts and the last one's results are under way. See ``muonclip.plan`` for what is
decided beforehand. One process is the trivial layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.plan import Matrix, Part, Piece, Plan, Task, plan_together, travelling_parts

# From whole matrices [m, n], and which they are (parameter, number in it), to as many of the same shapes.
Function = Callable[[list[Tensor], list[tuple[str, int]]], list[Tensor]]


@dataclass(frozen=True)
class FlatLayout:
    """Where everything lies in a flat tensor that is cut over the ranks of a group. Padding is in no piece."""

    pieces_by_rank: tuple[tuple[Piece, ...], ...]
    rank: int  # of this process in the group
    group: dist.ProcessGroup | None  # None: all processes


@dataclass(frozen=True)
class Work:
    """What the matrices of a layout cost, and how they travel."""

    layout: FlatLayout
    cost: Callable[[int, int], float]  # of a matrix, from its rows and columns
    dtype: torch.dtype  # of what is sent
    buffer_bytes: int  # that may be held for it


def plan_exchanges(
    works: Sequence[Work], split: Mapping[str, Sequence[int]], *, relief: Mapping[int, int] | None = None
) -> list[Exchange]:
    """The exchanges of all layouts of this process, with work that is even in sum; called by all ranks together.

    Args:
        works: of each layout.
        split: see ``Plan``.
        relief: see ``MuonClip.shard``.

    Raises:
        ValueError: see ``Plan``.
    """
    members = [_global_ranks(work.layout) for work in works]
    if relief is None:
        relief = _smallest_groups(works, members)
    tasks = [
        Task(work.layout.pieces_by_rank, ranks, work.cost, work.buffer_bytes // work.dtype.itemsize)
        for work, ranks in zip(works, members, strict=True)
    ]
    plans = plan_together(tasks, split=split, relief=relief, load={})
    return [Exchange(work.layout, plan, dtype=work.dtype) for work, plan in zip(works, plans, strict=True)]


def _smallest_groups(works: Sequence[Work], members: Sequence[Sequence[int]]) -> dict[int, int]:
    """Of each rank, the first one of its smallest group; nothing where all groups are of one size."""
    if len({len(ranks) for ranks in members}) <= 1:
        return {}
    largest = max(range(len(works)), key=lambda n: len(members[n]))
    smallest: list[int] = [0] * len(members[largest])
    dist.all_gather_object(smallest, min(members, key=len)[0], group=works[largest].layout.group)
    return dict(zip(members[largest], smallest, strict=True))


def _global_ranks(layout: FlatLayout) -> list[int]:
    if len(layout.pieces_by_rank) == 1:
        return [dist.get_rank() if dist.is_initialized() else 0]
    return dist.get_process_group_ranks(layout.group)


class Exchange:
    """Carries out a plan for this rank."""

    def __init__(self, layout: FlatLayout, plan: Plan, *, dtype: torch.dtype) -> None:
        """Looks up what this rank has to do.

        Args:
            layout: of the shards.
            plan: of that layout.
            dtype: of what is sent by ``begin``.
        """
        self.plan, self.dtype = plan, dtype
        self._rank, self._group = layout.rank, layout.group
        self._local = plan.local(layout.rank)
        self._rounds = [_Round(matrices, rank=layout.rank, ranks=plan.ranks) for matrices in plan.rounds]

    @property
    def owned(self) -> list[tuple[str, int]]:
        """The matrices that this rank orthogonalises, in order: parameter, and number in it."""
        rounds = [matrix for round_ in self._rounds for matrix in round_.owned]
        return [(m.name, m.number) for m in [*self._local, *rounds]]

    def begin(self, values: Tensor, *, dtype: torch.dtype | None = None) -> Passage:
        """Sends the parts of the first round; called by all ranks of the group, as are the methods of the result.

        Args:
            values: this rank's shard, 1-D, in which the results will lie. What is in no piece stays as it is.
            dtype: of what is sent, if not the plan's.
        """
        dtype = dtype or self.dtype
        return Passage(values, self._local, self._rounds, rank=self._rank, group=self._group, dtype=dtype)

    def whole(self, values: Tensor) -> list[Tensor]:
        """The matrices [m, n] that this rank owns, as ``owned`` names them; called by all ranks of the group.

        Args:
            values: this rank's part of what is cut as the weights are, 1-D. The matrices may be views of it.
        """
        found: list[Tensor] = []

        def keep(matrices: list[Tensor], _: object) -> list[Tensor]:
            found.extend(matrices)
            return matrices

        passage = self.begin(values, dtype=values.dtype)
        passage.work(keep)
        passage.finish()
        return found


class _Round:
    """What one rank sends and gets in a round. Results take the same way back."""

    def __init__(self, matrices: Sequence[Matrix], *, rank: int, ranks: int) -> None:
        parts = travelling_parts(matrices)
        self.owned = [m for m in matrices if m.owner == rank]
        # Sorted by the rank at the other end; sorting is stable, so that both ends have one order.
        self.lent = sorted(((m, p) for m, p in parts if p.rank == rank), key=lambda part: part[0].owner)
        self.borrowed = sorted(((m, p) for m, p in parts if m.owner == rank), key=lambda part: part[1].rank)
        self.lent_sizes, self.borrowed_sizes = [0] * ranks, [0] * ranks  # elements by rank
        for matrix, part in self.lent:
            self.lent_sizes[matrix.owner] += part.length
        for _, part in self.borrowed:
            self.borrowed_sizes[part.rank] += part.length


class Passage:
    """A shard on its way through a function of whole matrices, in place: ``work``, then ``finish``.

    A matrix's place is written to when its result is there; its parts were sent before.
    """

    def __init__(
        self,
        values: Tensor,
        local: Sequence[Matrix],
        rounds: Sequence[_Round],
        *,
        rank: int,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
    ) -> None:
        self._values = values
        self._local, self._rounds, self._rank, self._group, self._dtype = local, rounds, rank, group, dtype
        self._returning: tuple[_Round, _Transfer] | None = None
        self._arriving = self._collect(0)

    def work(self, function: Function) -> None:
        """Applies a function to the matrices that this rank owns: those that lie here, then round by round."""
        self._apply(function, self._local, [self._whole(m) for m in self._local])
        for number, round_ in enumerate(self._rounds):
            whole = self._assemble(round_)
            self._arriving = self._collect(number + 1)
            results = self._apply(function, round_.owned, whole)
            self._take_back()
            found = {id(m): result for m, result in zip(round_.owned, results, strict=True)}
            parts = [found[id(m)][part.start : part.stop] for m, part in round_.borrowed]
            self._returning = round_, self._send(parts, round_.borrowed_sizes, round_.lent_sizes)

    def finish(self) -> None:
        """Waits for the last results: then the shard holds all of them."""
        self._take_back()

    def _collect(self, number: int) -> _Transfer | None:
        """Sends the parts of a round to their owners, if there is such a round."""
        if number == len(self._rounds):
            return None
        round_ = self._rounds[number]
        parts = [self._flat(self._values, part) for _, part in round_.lent]
        return self._send(parts, round_.lent_sizes, round_.borrowed_sizes)

    def _take_back(self) -> None:
        """Waits for the results of the last round that were sent."""
        if self._returning is not None:
            round_, transfer = self._returning
            received = torch.split(transfer.wait(), [part.length for _, part in round_.lent])
            for (_, part), values in zip(round_.lent, received, strict=True):
                self._flat(self._values, part).copy_(values)
            self._returning = None

    def _assemble(self, round_: _Round) -> list[Tensor]:
        assert self._arriving is not None
        received, self._arriving = self._arriving.wait(), None  # its memory is free before the next parts arrive
        whole = {id(m): self._values.new_empty(m.rows * m.columns) for m in round_.owned}
        arrived = torch.split(received, [part.length for _, part in round_.borrowed])
        for (matrix, part), values in zip(round_.borrowed, arrived, strict=True):
            whole[id(matrix)][part.start : part.stop] = values
        for matrix in round_.owned:
            for part in matrix.parts:
                if part.rank == self._rank:
                    whole[id(matrix)][part.start : part.stop] = self._flat(self._values, part)
        return list(whole.values())

    def _whole(self, matrix: Matrix) -> Tensor:
        """A matrix that lies here, mostly in one part."""
        parts = [self._flat(self._values, part) for part in matrix.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _apply(self, function: Function, matrices: Sequence[Matrix], flat: Sequence[Tensor]) -> list[Tensor]:
        """Results, flat; what of them belongs to this rank is put in its place."""
        inputs = [values.view(m.rows, m.columns) for m, values in zip(matrices, flat, strict=True)]
        results = [result.reshape(-1) for result in function(inputs, [(m.name, m.number) for m in matrices])]
        for matrix, result in zip(matrices, results, strict=True):
            for part in matrix.parts:
                if part.rank == self._rank:
                    self._flat(self._values, part).copy_(result[part.start : part.stop])
        return results

    def _send(self, parts: Sequence[Tensor], sizes: list[int], arriving: list[int]) -> _Transfer:
        sent = self._values.new_empty(sum(sizes), dtype=self._dtype)
        for place, part in zip(torch.split(sent, [len(part) for part in parts]), parts, strict=True):
            place.copy_(part)
        received = self._values.new_empty(sum(arriving), dtype=self._dtype)
        # Every rank enters it, even with nothing to send.
        handle = dist.all_to_all_single(received, sent, arriving, sizes, group=self._group, async_op=True)
        return _Transfer(handle, sent, received)

    def _flat(self, shard: Tensor, part: Part) -> Tensor:
        return shard[part.offset : part.offset + part.length]


@dataclass
class _Transfer:
    handle: dist.Work
    sent: Tensor  # must live as long as it is under way
    received: Tensor

    def wait(self) -> Tensor:
        self.handle.wait()
        return self.received
