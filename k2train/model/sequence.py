"""Sequences shared out over processes: DeepSpeed-Ulysses (arXiv 2309.14509).

Each of P processes has an equal part of every sequence and computes all that concerns single tokens for it. Around
attention, which concerns pairs, two all-to-alls change that for a share of the heads over the whole sequence, and back.

This is the exchange of ``deepspeed.sequence.layer`` (a test holds the two together), by torch.distributed:
``DistributedAttention`` sends queries, keys and values one after the other where one message will do, has no way out
for the largest logits that its heads have found, and would bring DeepSpeed into the model.

Shapes: B batch, H heads, T tokens of whole sequences, P processes, h = H/P, t = T/P, d dims of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    """Part p of the first dimension goes to process p. With equal parts the exchange is its own transpose."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.group), None


def _exchanged(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, parts.contiguous(), group=group)
    return out


@dataclass(frozen=True)
class SequenceParallel:
    """The processes that share out sequences; this one has tokens [rank * t, (rank + 1) * t) of each."""

    group: dist.ProcessGroup
    size: int
    rank: int

    def part(self, length: int) -> slice:
        """The positions of this process, in sequences of ``length``, a multiple of ``size``."""
        return slice(self.rank * length // self.size, (self.rank + 1) * length // self.size)

    def to_heads(self, *parts_BHtd: Tensor) -> list[Tensor]:
        """Tensors [B, H, t, d], whose d may differ, as [B, h, T, d]: in one exchange, contiguous."""
        by_process = [part.view(len(part), self.size, -1, *part.shape[2:]).movedim(1, 0) for part in parts_BHtd]
        received: Tensor = _AllToAll.apply(torch.cat(by_process, dim=-1), self.group)  # type: ignore[no-untyped-call]
        whole = torch.split(received, [part.shape[-1] for part in parts_BHtd], dim=-1)
        return [each.permute(1, 2, 0, 3, 4).flatten(2, 3) for each in whole]

    def to_sequence(self, heads_BhTd: Tensor) -> Tensor:
        """[B, h, T, d] as [B, H, t, d], the inverse."""
        B, h, _, d = heads_BhTd.shape
        by_process = heads_BhTd.view(B, h, self.size, -1, d).movedim(2, 0)
        received: Tensor = _AllToAll.apply(by_process, self.group)  # type: ignore[no-untyped-call]
        return received.movedim(0, 1).flatten(1, 2)

    def among_heads(self, own_h: Tensor, *, others: float) -> Tensor:
        """Numbers [h] of this process's heads among those of all [H], with ``others`` in the place of the rest."""
        h = len(own_h)
        return F.pad(own_h, (self.rank * h, (self.size - 1 - self.rank) * h), value=others)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes, without gradient."""
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total
