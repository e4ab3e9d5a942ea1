"""A run rehearsed by one process in the part of any of its ranks: what that rank is, holds, owns and reads first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from k2train.comm import World
from k2train.config import RehearseConfig
from k2train.data import Dataset, TrainStream, build_stream
from k2train.experiments.play import Slice, build_slice, played
from k2train.experiments.stand_in import stand_in
from k2train.train.phases import Plan, build_plan
from k2train.train.trainer import vocabulary_size

FIRST_STEPS = 3  # whose data is walked, beside the first one of each phase


@dataclass(frozen=True)
class Owned:
    """Matrices of a role that ranks orthogonalise."""

    role: str
    shared_by: int  # ranks
    here: int
    least: int  # of a rank, as most
    most: int
    rounds: int  # of the exchange, two all-to-alls each
    sent: int  # bytes by this rank
    most_sent: int


@dataclass(frozen=True)
class Read:
    """What this rank reads in a step."""

    step: int  # from 1
    phase: str
    micro_batches: int
    samples: Mapping[str, int]  # by source
    first: int  # number of the first of them
    window: int  # of its source, that it is


@dataclass(frozen=True)
class Rehearsal:
    """What one rank is, and what all of them hold."""

    world: World
    experts: range  # that this rank has of each layer
    held: Mapping[str, int]  # bytes by component: weights, fp32 masters, momenta
    owned: Sequence[Owned]
    work: float  # of this rank in Newton-Schulz, over the mean of the ranks with the same experts
    most_work: float
    settings: Mapping[str, Any]  # DeepSpeed's
    real_data: bool
    reads: Sequence[Read]
    notes: Sequence[str]


def rehearse(config: RehearseConfig, *, precision: str, dataset: Dataset | None) -> Rehearsal:
    """Plays ``config.rank``; once in a process.

    Args:
        config: of the run.
        precision: fp32 or bf16.
        dataset: that the run will read; None: one stands in for it.

    Raises:
        ConfigError: the parts of the schedule do not fit together.
        RunError: the vocabulary does not fit.
        DataError: the data does not do for the run.
        ValueError: the optimizer cannot take a parameter.
    """
    plan = build_plan(config)
    data, notes = dataset or stand_in(config.data, tokens=plan.tokens), list[str]()
    if dataset is not None:
        config = replace(config, model=replace(config.model, vocab_size=vocabulary_size(config, dataset)))
    elif config.data.order.packing:
        config = replace(config, data=replace(config.data, order=replace(config.data.order, packing=False)))
        notes.append("data.order.packing: which documents share a window only the data tells; windows are cut evenly")
    stream = build_stream(data, config.data, plan.data_phases(), seed=config.seed, boundaries=False)
    cluster = config.cluster
    with played(config.rank, size=cluster.devices, local_size=cluster.devices_per_node, device=cluster.device) as world:
        found = build_slice(config, world=world, precision=precision)
        owned, loads = _owned(found)
        first = found.experts.first_expert(config.model.n_routed_experts)
        mean = sum(loads.values()) / len(loads) if loads else 0.0
        return Rehearsal(
            world=world,
            experts=range(first, first + config.model.n_routed_experts // found.experts.size),
            held=_held(found),
            owned=owned,
            work=loads[world.rank] / mean if mean else 0.0,
            most_work=max(loads.values()) / mean if mean else 0.0,
            settings=found.settings,
            real_data=dataset is not None,
            reads=list(_walk(stream, plan, world=world, sharing=config.parallel.sequence_parallel)),
            notes=[*notes, *stream.notes],
        )


def _held(found: Slice) -> dict[str, int]:
    """Bytes of storage, each counted once."""
    parameters = list(found.model.parameters())
    weights = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")] + [p.data for p in parameters]
    states = [found.optimizer.state[shard.flat] for shard in found.shards]
    return {
        "weights": _storage(weights),
        "fp32 masters": _storage(shard.flat for shard in found.shards),
        "momenta": _storage(values for state in states for key, values in state.items() if key != "step"),
    }


def _storage(tensors: Iterable[Tensor]) -> int:
    # By the storage itself: fake ones have no address.
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def _owned(found: Slice) -> tuple[list[Owned], dict[int, float]]:
    """By role; and the multiply-adds of this rank and of those that share all matrices with it."""
    roles = found.model.parameter_roles()
    result, loads = [], list[dict[int, float]]()
    for flat, group in found.optimizer.tensors():
        if group["algorithm"] != "muon":
            continue
        exchange, layout = found.optimizer.exchange(flat, group), found.optimizer.layout_of(flat)
        plan, size = exchange.plan, exchange.dtype.itemsize
        counts = Counter(matrix.owner for matrix in plan.matrices)
        every, sent = [counts[number] for number in range(plan.ranks)], [size * t.sent for t in plan.traffic()]
        result.append(
            Owned(
                role=roles[plan.matrices[0].name],
                shared_by=plan.ranks,
                here=every[layout.rank],
                least=min(every),
                most=max(every),
                rounds=len(plan.rounds),
                sent=sent[layout.rank],
                most_sent=max(sent),
            )
        )
        members = dist.get_process_group_ranks(layout.group)
        loads.append(dict(zip(members, plan.costs, strict=True)))
    shared = set.intersection(*map(set, loads)) if loads else set()
    return result, {rank: sum(load[rank] for load in loads) for rank in shared}


def _walk(stream: TrainStream, plan: Plan, *, world: World, sharing: int) -> Iterable[Read]:
    """The first steps, and the first of each phase."""
    numbers = sorted({*range(min(FIRST_STEPS, plan.steps)), *(phase.first_step for phase in plan.phases)})
    for number in numbers:
        step = plan.step(number)
        parts = step.micro_batches(rank=world.rank // sharing, processes=world.size // sharing)
        places = [stream.samples.find(sample) for part in parts for sample in part]
        samples = Counter(place.part.name for place in places)
        yield Read(
            step=number + 1,
            phase=step.phase.name,
            micro_batches=len(parts),
            samples=samples,
            first=parts[0].start,
            window=places[0].window,
        )
