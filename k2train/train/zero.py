"""Which rank holds which interval of which parameter under ZeRO: DeepSpeed's inside, read in one place.

Stages 1 and 2 lay each optimizer group out as one flat fp32 tensor and cut that into equal parts over its process
group, without regard to where a parameter ends. Stage 3 cuts each parameter into equal parts by itself, so that every
matrix is split over all ranks of the group, and keeps the parts of a group in one flat tensor or several (sub-groups).
The process group is all ranks for dense parameters, the expert-data group for experts. The optimizer, QK-Clip and
checkpoints see these intervals by global name (``FlatLayout``), never DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from muonclip.plan import Piece, cut
from muonclip.sharded import FlatLayout
from torch import nn

from k2train.train.own_optimizer import AnyOptimizer

Names = Mapping[nn.Parameter, str]


@dataclass(frozen=True)
class Shard:
    """This rank's part of one optimizer group, or at stage 3 of a part of a group."""

    flat: torch.Tensor  # fp32 masters, 1-D, with padding
    layout: FlatLayout
    parameters: Mapping[str, nn.Parameter]  # the weights the model computes with, by name

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The intervals that this rank holds."""
        return self.layout.pieces_by_rank[self.layout.rank]


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape, also where stage 3 has left nothing of it but this rank's part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def partitioner(device: torch.device) -> Callable[[nn.Parameter], None]:
    """What leaves of a parameter only this rank's part: stage 3's ``zero.Init``, a parameter at a time."""
    init = deepspeed.zero.Init(mem_efficient_linear=False)
    assert init.local_device.type == device.type, f"DeepSpeed computes on {init.local_device}, the run on {device}"
    return lambda parameter: init._convert_to_zero_parameters([parameter])


def forget_gradients(zero_optimizer: Any) -> None:
    """Drops what a step that was not applied has left of its gradients.

    DeepSpeed 0.19 does so itself but at stages 1 and 2 with offload and bf16: there the next step's gradients would be
    added to those that are not finite, and no step would be applied any more.
    """
    if isinstance(zero_optimizer, DeepSpeedZeroOptimizer):
        zero_optimizer.averaged_gradients.update(dict.fromkeys(zero_optimizer.averaged_gradients))


def shards(zero_optimizer: Any, names: Names) -> list[Shard]:
    """The layout of each flat tensor that the optimizer works on.

    Args:
        zero_optimizer: ``engine.optimizer``.
        names: of every parameter.
    """
    if isinstance(zero_optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _parts_of_each(zero_optimizer, names)
    found = []
    for number, (flat, parameters, offsets) in enumerate(_groups(zero_optimizer)):
        group, size = zero_optimizer.real_dp_process_group[number], len(flat)
        laid_out = [(names[p], tuple(p.shape), offset) for p, offset in zip(parameters, offsets, strict=True)]
        pieces_by_rank = cut(laid_out, ranks=dist.get_world_size(group), size=size)
        layout = FlatLayout(pieces_by_rank, dist.get_rank(group), group)
        found.append(Shard(flat, layout, {names[p]: p for p in parameters}))
    return found


def hand_over(
    zero_optimizer: Any,
    optimizer: AnyOptimizer,
    held: list[Shard],
    *,
    relief: Mapping[int, int] | None = None,
) -> None:
    """Tells the optimizer what it works on from now on; ``relief`` as in ``MuonClip.shard``."""
    # Between steps, groups of stage 3 are empty: each tensor is put into its own for its update alone.
    emptied = isinstance(zero_optimizer, DeepSpeedZeroOptimizer_Stage3)
    if emptied:
        zero_optimizer._set_fp32_optimizer_param_groups()
    optimizer.shard({shard.flat: shard.layout for shard in held}, relief=relief)
    if emptied:
        zero_optimizer._clear_fp32_optimizer_param_groups()


def refresh_weights(zero_optimizer: Any, held: list[Shard]) -> None:
    """Copies the masters, after they were written to, into the weights of all ranks, and checks that they arrived."""
    if isinstance(zero_optimizer, DeepSpeedZeroOptimizer_Stage3):
        zero_optimizer._partition_all_parameters()
        for number in range(len(zero_optimizer.fp16_groups)):
            zero_optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if kept := zero_optimizer.persistent_parameters:  # small ones that stay whole between steps
            kept[0].all_gather(kept)
    else:
        zero_optimizer.update_lp_params()
    check_weights(held)


@torch.no_grad()
def check_weights(held: list[Shard]) -> None:
    """Asserts that the weights are the masters, cast: that the layout read here is the one DeepSpeed uses."""
    for shard in held:
        pieces = {piece.name: piece for piece in shard.pieces}
        for name, parameter in shard.parameters.items():
            with deepspeed.zero.GatheredParameters([parameter]):  # of stages 1 and 2: nothing to gather
                assert tuple(parameter.shape) == whole_shape(parameter)
                if (piece := pieces.get(name)) is None:
                    continue
                weight = parameter.view(-1)[piece.start : piece.stop]
                master = shard.flat[piece.offset : piece.offset + piece.stop - piece.start]
                same = torch.equal(weight, master.to(weight.device, weight.dtype))
                assert same, f"ZeRO's layout of {name} is not as expected"


def _groups(zero: Any) -> list[tuple[torch.Tensor, list[nn.Parameter], list[int]]]:
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


def _cumulated(parameters: list[nn.Parameter]) -> list[int]:
    return [0, *accumulate(p.numel() for p in parameters)][:-1]


def _parts_of_each(zero: DeepSpeedZeroOptimizer_Stage3, names: Names) -> list[Shard]:
    """Stage 3: rank r holds elements [r * size, (r + 1) * size) of each parameter, the last one with padding."""
    found = []
    for flat, parameters, group in zip(
        zero.fp32_partitioned_groups_flat, zero.fp16_groups, zero.sub_group_process_groups, strict=True
    ):
        sizes = [parameter.ds_tensor.ds_numel for parameter in parameters]
        assert len(flat) == sum(sizes)
        offsets = [0, *accumulate(sizes)]
        pieces_by_rank = tuple(
            tuple(
                Piece(names[p], whole_shape(p), rank * size, min((rank + 1) * size, p.ds_numel), offset)
                for p, size, offset in zip(parameters, sizes, offsets, strict=False)
                if rank * size < p.ds_numel
            )
            for rank in range(dist.get_world_size(group))
        )
        layout = FlatLayout(pieces_by_rank, dist.get_rank(group), group)
        found.append(Shard(flat, layout, {names[p]: p for p in parameters}))
    return found
