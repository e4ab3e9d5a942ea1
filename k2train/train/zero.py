"""Which rank holds which interval of which parameter under ZeRO: DeepSpeed's inside, read in one place.

Each optimizer group is one flat fp32 tensor cut into equal parts over its process group: all ranks for dense
parameters, the expert-data group for experts. The optimizer, QK-Clip and checkpoints see these intervals by global
name (``FlatLayout``), never DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from muonclip.plan import Piece, cut
from muonclip.sharded import FlatLayout


@dataclass(frozen=True)
class Shard:
    """This rank's part of one optimizer group."""

    flat: torch.Tensor  # fp32 masters, 1-D, with padding at the end
    layout: FlatLayout
    parameters: Mapping[str, torch.nn.Parameter]  # the weights the model computes with, whole, by name

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The intervals that this rank holds."""
        return self.layout.pieces_by_rank[self.layout.rank]


def shards(zero_optimizer: Any, names: Mapping[torch.nn.Parameter, str]) -> list[Shard]:
    """The layout of each optimizer group.

    Args:
        zero_optimizer: ``engine.optimizer`` of ZeRO stage 1 or 2.
        names: of every parameter.
    """
    found = []
    for number, (flat, parameters, offsets) in enumerate(_groups(zero_optimizer)):
        group, size = zero_optimizer.real_dp_process_group[number], len(flat)
        laid_out = [(names[p], tuple(p.shape), offset) for p, offset in zip(parameters, offsets, strict=True)]
        pieces_by_rank = cut(laid_out, ranks=dist.get_world_size(group), size=size)
        layout = FlatLayout(pieces_by_rank, dist.get_rank(group), group)
        found.append(Shard(flat, layout, {names[p]: p for p in parameters}))
    return found


def refresh_weights(zero_optimizer: Any, held: list[Shard]) -> None:
    """Copies the masters, after they were written to, into the weights of all ranks, and checks that they arrived."""
    zero_optimizer.update_lp_params()
    check_weights(held)


def check_weights(held: list[Shard]) -> None:
    """Asserts that the weights are the masters, cast: that the layout read here is the one DeepSpeed uses."""
    for shard in held:
        for piece in shard.pieces:
            weight = shard.parameters[piece.name].detach().view(-1)[piece.start : piece.stop]
            master = shard.flat.detach()[piece.offset : piece.offset + piece.stop - piece.start]
            assert torch.equal(weight, master.to(weight.dtype)), f"ZeRO's layout of {piece.name} is not as expected"


def _groups(zero: Any) -> list[tuple[torch.Tensor, list[torch.nn.Parameter], list[int]]]:
    """Of each group: this rank's flat shard, the parameters in flat order, their offsets in the whole flat tensor."""
    if isinstance(zero, BF16_Optimizer):
        return [
            (flat, parameters, _cumulated(parameters))
            for flat, parameters in zip(zero.fp32_groups_flat_partition, zero.bf16_groups, strict=True)
        ]
    assert isinstance(zero, DeepSpeedZeroOptimizer), f"no layout is known of {type(zero).__name__}"
    return [
        (flat, parameters, offsets)
        for flat, parameters, offsets in zip(
            zero.single_partition_of_fp32_groups,
            zero.round_robin_bit16_groups,
            zero.round_robin_bit16_offsets,
            strict=True,
        )
    ]


def _cumulated(parameters: list[torch.nn.Parameter]) -> list[int]:
    return [0, *accumulate(p.numel() for p in parameters)][:-1]
