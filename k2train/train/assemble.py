"""Model, optimizer and engine of a run, as a rank holds them."""

from __future__ import annotations

from dataclasses import dataclass

from deepspeed import DeepSpeedEngine
from muonclip import QKClip

from k2train.comm import World
from k2train.config import RunConfig
from k2train.model import ExpertParallel, SequenceParallel, Transformer, build_model, materialise
from k2train.train import zero
from k2train.train.compile import Compiled
from k2train.train.engine import PRECISIONS, build_clip, build_engine, build_optimizer, start_deepspeed
from k2train.train.experts import DeepSpeedMoE, expert_groups, group_name, mark_experts
from k2train.train.own_optimizer import AnyOptimizer
from k2train.train.sequence import sequence_group


@dataclass(frozen=True)
class Assembled:
    """What is trained, and what trains it."""

    model: Transformer
    compiled: Compiled | None
    clip: QKClip
    optimizer: AnyOptimizer
    engine: DeepSpeedEngine
    shards: list[zero.Shard]  # of the parameters, that this rank updates
    experts: ExpertParallel
    sequence_parallel: SequenceParallel | None


def assemble(config: RunConfig, *, world: World, precision: str) -> Assembled:
    """Builds all of it with its first weights; called by all ranks.

    Args:
        config: of the run; ``model.vocab_size`` is a number.
        world: the processes of the run.
        precision: fp32 or bf16.
    """
    start_deepspeed(world)
    experts = expert_groups(world, size=config.parallel.expert_parallel)
    sequence_parallel = sequence_group(world, size=config.parallel.sequence_parallel)
    # Shapes first: the optimizer needs no more, and at stage 3 no process ever holds all weights.
    model = build_shapes(config, experts, precision=precision)
    compiled = Compiled(model, device=world.device) if config.train.compile else None
    clip = build_clip(config.optim, model)
    optimizer = build_optimizer(config.optim, model, clip, expert_group=group_name(experts.size), device=world.device)
    materialise(
        model,
        device=world.device,
        seed=config.seed,
        config=config.model,
        first_expert=experts.first_expert(config.model.n_routed_experts),
        placed=zero.partitioner(world.device) if config.parallel.zero_stage == 3 else None,
    )
    engine = build_engine(config, model, optimizer, world=world, precision=precision)
    shards = zero.shards(engine.optimizer, {p: n for n, p in model.named_parameters()})
    zero.hand_over(engine.optimizer, optimizer, shards)
    zero.check_weights(shards)
    return Assembled(model, compiled, clip, optimizer, engine, shards, experts, sequence_parallel)


def build_shapes(config: RunConfig, experts: ExpertParallel, *, precision: str) -> Transformer:
    """This rank's part of the model on the meta device."""
    model = build_model(
        config.model,
        seed=config.seed,
        dtype=PRECISIONS[precision],
        device="meta",
        expert_parallel=experts if experts.size > 1 else None,
        moe_class=DeepSpeedMoE,
    )
    mark_experts(model, experts)
    model.checkpoint_activations(config.train.activation_checkpointing)
    return model
