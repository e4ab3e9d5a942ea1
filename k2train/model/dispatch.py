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

# rows sorted by expert [M, D], rows of each expert -> outputs [M, D]
RunExperts = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExpertParallel:
    """The processes that share out the experts of a layer; this one holds [rank * E/size, (rank + 1) * E/size)."""

    group: dist.ProcessGroup
    size: int
    rank: int


class _Spread(torch.autograd.Function):
    """Token rows to expert order. Backward gathers and sums: deterministic, where index_add on a GPU is not."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_M: Tensor, place_M: Tensor) -> Tensor:
        ctx.save_for_backward(place_M)
        ctx.tokens = len(x_ND)
        return x_ND.index_select(0, token_M)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place_M,) = ctx.saved_tensors
        rows = grad.index_select(0, place_M)
        return (rows if len(rows) == ctx.tokens else rows.view(ctx.tokens, -1, rows.shape[-1]).sum(1)), None, None


class _Combine(torch.autograd.Function):
    """The weighted sum of each token's K rows, from expert order."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weights_NK: Tensor, order_M: Tensor, place_M: Tensor) -> Tensor:
        ctx.save_for_backward(y_MD, weights_NK, order_M, place_M)
        N, K = weights_NK.shape
        rows_NKD = y_MD.index_select(0, place_M).view(N, K, -1)
        wide = torch.promote_types(y_MD.dtype, weights_NK.dtype)
        return torch.bmm(weights_NK[:, None].to(wide), rows_NKD.to(wide)).squeeze(1).to(y_MD.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_MD, weights_NK, order_M, place_M = ctx.saved_tensors
        grad_MD = grad.index_select(0, order_M // weights_NK.shape[1])
        grad_weights = torch.linalg.vecdot(y_MD, grad_MD).to(weights_NK.dtype).index_select(0, place_M)
        weights_M1 = weights_NK.flatten().index_select(0, order_M)[:, None].to(grad.dtype)
        return grad_MD.mul_(weights_M1), grad_weights.view_as(weights_NK), None, None


class _Exchange(torch.autograd.Function):
    """all_to_all_single of uneven numbers of rows; its transpose is the exchange the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.new_empty(sum(ctx.sent), grad.shape[1])
        dist.all_to_all_single(out, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return out, None, None, None


def _sorted(key_M: Tensor) -> tuple[Tensor, Tensor]:
    """The order that sorts rows by key, ties in the order given, and the place that each row then has."""
    order = key_M.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order, place


class Dispatch(Protocol):
    """What a mixture-of-experts layer needs: every implementation gives the same outputs and gradients."""

    def __call__(
        self, experts: RunExperts, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor, loads_E: Tensor
    ) -> Tensor:
        """The weighted sum over each token's experts.

        Args:
            experts: the experts of this process.
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
        self, experts: RunExperts, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor, loads_E: Tensor
    ) -> Tensor:
        """See ``Dispatch``."""
        order_M, place_M = _sorted(index_NK.flatten())
        rows_MD = _Spread.apply(x_ND, order_M // index_NK.shape[1], place_M)  # type: ignore[no-untyped-call]
        out: Tensor = _Combine.apply(experts(rows_MD, loads_E), weights_NK, order_M, place_M)  # type: ignore[no-untyped-call]
        return out


class AllToAllDispatch:
    """Experts are shared out over a group: rows travel to them and back by two all-to-alls.

    Every process of the group must call it equally often, if with no token, in the forward and in the backward pass.
    """

    def __init__(self, parallel: ExpertParallel) -> None:
        self.group, self.size = parallel.group, parallel.size

    def __call__(
        self, experts: RunExperts, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor, loads_E: Tensor
    ) -> Tensor:
        """See ``Dispatch``."""
        order_M, place_M = _sorted(index_NK.flatten())
        rows_MD = _Spread.apply(x_ND, order_M // index_NK.shape[1], place_M)  # type: ignore[no-untyped-call]
        # Sorted by global expert is sorted by process; what arrives is sorted by (source, own expert).
        sent_PF = loads_E.view(self.size, -1)
        received_PF = torch.empty_like(sent_PF)
        dist.all_to_all_single(received_PF, sent_PF, group=self.group)
        sent, received = torch.stack((sent_PF.sum(1), received_PF.sum(1))).tolist()
        arrived = _Exchange.apply(rows_MD, sent, received, self.group)  # type: ignore[no-untyped-call]
        expert_F = torch.arange(sent_PF.shape[1], device=x_ND.device).repeat(self.size)
        expert_of_row = expert_F.repeat_interleave(received_PF.flatten(), output_size=sum(received))
        order, place = _sorted(expert_of_row)
        done = experts(_Spread.apply(arrived, order, place), received_PF.sum(0))  # type: ignore[no-untyped-call]
        returned = _Exchange.apply(_Spread.apply(done, place, order), received, sent, self.group)  # type: ignore[no-untyped-call]
        out: Tensor = _Combine.apply(returned, weights_NK, order_M, place_M)  # type: ignore[no-untyped-call]
        return out
