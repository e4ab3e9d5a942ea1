"""One process in the part of any rank of a run: the run's own code and DeepSpeed's, without other ranks and memory.

Collectives go to torch's fake process group, which has as many ranks as one likes and hands nothing on. Tensors are
fake ones, which have shape, dtype and storage but no numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from muonclip import MuonClip
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from k2train.comm import World, close_world
from k2train.config import RunConfig
from k2train.model import ExpertParallel, Transformer
from k2train.train import zero
from k2train.train.assemble import build_shapes
from k2train.train.engine import (
    build_clip,
    build_engine,
    build_optimizer,
    deepspeed_config,
    start_deepspeed,
)
from k2train.train.experts import expert_groups, group_name
from k2train.train.sequence import sequence_group


@dataclass(frozen=True)
class Slice:
    """What a rank of a run is made of; all tensors are fake."""

    model: Transformer
    optimizer: MuonClip
    shards: list[zero.Shard]
    experts: ExpertParallel
    settings: dict[str, Any]  # DeepSpeed's


@contextmanager
def played(rank: int, *, size: int, local_size: int, device: str) -> Iterator[World]:
    """This process as a rank of a run; once in a process, as DeepSpeed keeps its groups.

    Args:
        rank: that is played.
        size: processes of the run.
        local_size: of them on a node.
        device: of the run; nothing is computed on it.
    """
    local_rank = rank % local_size
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local_size)
    )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank, size, local_rank, local_size, torch.device(device))
    finally:
        close_world()


def build_slice(config: RunConfig, *, world: World, precision: str) -> Slice:
    """Builds what the Trainer builds on this rank, in the same order, up to the layout of the optimizer.

    Args:
        config: of the run; ``model.vocab_size`` is a number.
        world: of ``played``.
        precision: fp32 or bf16.
    """
    start_deepspeed(world)
    experts = expert_groups(world, size=config.parallel.expert_parallel)
    sequence_group(world, size=config.parallel.sequence_parallel)
    model = build_shapes(config, experts, precision=precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_fake_storage(model)
        clip = build_clip(config.optim, model)
        optimizer = build_optimizer(
            config.optim, model, clip, expert_group=group_name(experts.size), device=world.device
        )
        assert isinstance(optimizer, MuonClip), "the command refuses others"
        if config.parallel.zero_stage == 3:
            partition = zero.partitioner(torch.device("cpu"))
            for parameter in model.parameters():
                partition(parameter)
        engine = build_engine(config, model, optimizer, world=world, precision=precision)
        shards = zero.shards(engine.optimizer, {p: n for n, p in model.named_parameters()})
        sets = {rank: rank % experts.size for rank in range(world.size)}  # other ranks cannot be asked
        zero.hand_over(engine.optimizer, optimizer, shards, relief=sets)
    return Slice(model, optimizer, shards, experts, deepspeed_config(config, world=world, precision=precision))


def _give_fake_storage(model: Transformer) -> None:
    """Takes a model from the meta device to the CPU, parameter by parameter; those that are tied stay so."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                fake = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad)
                fake.__dict__.update(parameter.__dict__)  # what DeepSpeed reads of experts
                made[id(parameter)] = fake
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))

    def stay(*_: object, **__: object) -> Transformer:
        return model

    # It lies where DeepSpeed wants it already, and torch cannot swap fake parameters even for themselves.
    model.to = stay  # type: ignore[method-assign]
