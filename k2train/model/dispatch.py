"""Bringing tokens to their experts and the experts' outputs back: within a process, or across an expert-parallel group.

Shapes: N tokens, K experts a token, M = N*K rows (each token once for each of its experts), D model, E experts of all
processes, P processes of the group, F = E/P experts of each. No token is dropped, whatever the loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.model.permutation import combine, sorted_order, spread

# tokens [N, D], their experts [N, K] and weights [N, K], tokens of each expert -> weighted sums [N, D]
RunExperts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# tokens [N, D] -> the shared experts' outputs
RunShared = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExpertParallel:
    """The processes that share out the experts of a layer; this one holds [rank * E/size, (rank + 1) * E/size)."""

    group: dist.ProcessGroup
    size: int
    rank: int

    def first_expert(self, experts: int) -> int:
        """Global number of the first expert that this process holds, of so many in a layer."""
        return self.rank * (experts // self.size)


class _Flight:
    """A transfer under way: what started it keeps it here for what waits for it."""

    def __init__(self, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> None:
        self._group, self._rows = group, {True: (sent, received), False: (received, sent)}

    def start(self, rows: Tensor, *, forward: bool) -> Tensor:
        """Sends rows; returns where others' will arrive: to be read after ``finish``."""
        sent, received = self._rows[forward]
        self._outgoing = rows.contiguous()  # must live until it has gone
        self._arriving = rows.new_empty(sum(received), rows.shape[1])
        self._work = dist.all_to_all_single(
            self._arriving, self._outgoing, received, sent, group=self._group, async_op=True
        )
        return self._arriving

    def finish(self) -> Tensor:
        """Waits, and returns what arrived."""
        self._work.wait()
        arrived = self._arriving
        del self._work, self._outgoing, self._arriving
        return arrived


class _Depart(torch.autograd.Function):
    """First half of an all_to_all_single of uneven numbers of rows. What is computed before ``_Arrive`` overlaps.

    The transpose is the exchange the other way: there ``_Arrive`` starts it and ``_Depart`` waits. Autograd runs what
    was last computed first, so that the backward pass of what lies between overlaps too.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.start(rows, forward=True)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.finish(), None


class _Arrive(torch.autograd.Function):
    """Second half."""

    @staticmethod
    def forward(ctx: Any, arriving: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.finish().view_as(arriving)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.flight.start(grad, forward=False)
        return grad, None  # of the right shape, which is all that _Depart needs of it


class Dispatch(Protocol):
    """What a mixture-of-experts layer needs: every implementation gives the same outputs and gradients."""

    def __call__(
        self,
        experts: RunExperts,
        shared: RunShared | None,
        x_ND: Tensor,
        index_NK: Tensor,
        weights_NK: Tensor,
        loads_E: Tensor,
    ) -> Tensor:
        """The weighted sum over each token's experts, and the shared experts.

        Args:
            experts: the experts of this process.
            shared: the shared experts.
            x_ND: tokens of this process.
            index_NK: their experts, global numbers.
            weights_NK: fp32.
            loads_E: how often each expert is in ``index_NK``.

        Returns:
            [N, D].
        """
        ...


class LocalDispatch:
    """All experts are in this process."""

    def __call__(
        self,
        experts: RunExperts,
        shared: RunShared | None,
        x_ND: Tensor,
        index_NK: Tensor,
        weights_NK: Tensor,
        loads_E: Tensor,
    ) -> Tensor:
        """See ``Dispatch``."""
        out_ND = experts(x_ND, index_NK, weights_NK, loads_E)
        return out_ND if shared is None else out_ND + shared(x_ND)


class AllToAllDispatch:
    """Experts are shared out over a group: rows travel to them and back by two all-to-alls.

    Every process of the group must call it equally often, if with no token, in the forward and in the backward pass.
    The shared experts are computed while rows travel.
    """

    def __init__(self, parallel: ExpertParallel) -> None:
        self.group, self.size = parallel.group, parallel.size

    def __call__(
        self,
        experts: RunExperts,
        shared: RunShared | None,
        x_ND: Tensor,
        index_NK: Tensor,
        weights_NK: Tensor,
        loads_E: Tensor,
    ) -> Tensor:
        """See ``Dispatch``."""
        order_M, place_M = sorted_order(index_NK.flatten())
        # Sorted by global expert is sorted by process; what arrives is sorted by (source, own expert).
        sent_PF = loads_E.view(self.size, -1)
        received_PF = torch.empty_like(sent_PF)
        dist.all_to_all_single(received_PF, sent_PF, group=self.group)
        sent, received = torch.stack((sent_PF.sum(1), received_PF.sum(1))).tolist()
        there = _Flight(self.group, sent, received)
        arriving = _Depart.apply(spread(x_ND, order_M, place_M), there)  # type: ignore[no-untyped-call]
        shared_ND = None if shared is None else shared(x_ND)
        arrived = _Arrive.apply(arriving, there)  # type: ignore[no-untyped-call]

        expert_F = torch.arange(sent_PF.shape[1], device=x_ND.device).repeat(self.size)
        expert_of_row = expert_F.repeat_interleave(received_PF.flatten(), output_size=sum(received))
        # A row that arrived is a token with one expert; its weight stayed at home.
        one = weights_NK.new_ones(1, 1).expand(sum(received), 1)
        done = experts(arrived, expert_of_row[:, None], one, received_PF.sum(0))
        back = _Flight(self.group, received, sent)
        returned = _Arrive.apply(_Depart.apply(done, back), back)  # type: ignore[no-untyped-call]
        out_ND = combine(returned, weights_NK, order_M, place_M)
        return out_ND if shared_ND is None else out_ND + shared_ND
