"""What real runs hold and send, beside what the plan says of them: the measurement.

A run is one by the Trainer, on 1, 2 or 4 processes over gloo, all runs of as many processes by one process group in
turn. Its second step is counted; at the end of its last backward pass, gradients are there and nothing is updated yet.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import yaml
from torch import Tensor

from k2train.comm import close_world, gather_json, open_world
from k2train.config import ClusterConfig, PlanConfig, RunConfig, parse
from k2train.paths import RunPaths, config_dir
from k2train.plan.communication import by_kind
from k2train.plan.estimate import Estimate, Part, estimate, with_vocabulary
from k2train.train.quiet import import_deepspeed
from tests.distributed.plain import Layout, config_of, prepared, write_text
from tests.plan.collectives import Counted, count_collectives

STATE = ("weights", "gradients", "fp32 masters", "momenta")
KINDS = ("gradient reduce", "parameter gather", "expert all-to-all", "sequence all-to-all", "Muon exchange", "counts")


@dataclass(frozen=True)
class Result:
    """Planned and measured bytes of a run; means over ranks."""

    layout: Layout
    optimizer: str  # DeepSpeed's class
    planned: dict[str, float]
    measured: dict[str, float]

    def errors(self) -> dict[str, float]:
        """Relative, of each figure that is not 0."""
        names = [name for name in (*STATE, *KINDS) if self.planned.get(name) or self.measured.get(name)]
        return {
            name: abs(self.planned.get(name, 0) / self.measured[name] - 1) if self.measured.get(name) else float("inf")
            for name in names
        }


def every_layout() -> list[Layout]:
    """1, 2 and 4 ranks, ZeRO 1, 2 and 3, ep 1 and 2, one micro-batch a step and two, and bfloat16."""
    found = []
    for processes, stage, ep, accumulation in itertools.product((1, 2, 4), (1, 2, 3), (1, 2), (1, 2)):
        if processes % ep == 0:
            found.append(Layout(processes, ep, stage, accumulation=accumulation))
            if accumulation == 2:
                found.append(Layout(processes, ep, stage, "bf16", accumulation))
    found += [Layout(2, 2, 2, recompute="full"), Layout(2, 2, 1, recompute="selective"), Layout(2, 1, 2, offload=True)]
    return found + [Layout(2, 2, 2, recompute=mode, sequence_parallel=2) for mode in ("none", "selective", "full")]


def plan_config(config: RunConfig, **cluster: Any) -> PlanConfig:
    """A run's config with a cluster of CPUs."""
    values = yaml.safe_load((config_dir() / "cluster" / "cpu.yaml").read_text()) | cluster
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    found = PlanConfig(
        **fields, cluster=parse(ClusterConfig, values), phase=None, search=False, json=False, picture=None
    )
    return with_vocabulary(found)


def planned(config: RunConfig, ranks: int) -> Estimate:
    """The plan of a run on so many CPU processes."""
    train = config.train
    part = Part("all", 1, train.global_batch_size, train.micro_batch_size, train.sequence_length)
    return estimate(plan_config(config, devices_per_node=ranks), [part])


def figures(found: Estimate) -> dict[str, float]:
    """State and traffic, of a rank, in the mean."""
    (phase,) = found.phases
    sent = by_kind(list(phase.traffic))
    if found.exchange.sent:
        sent["Muon exchange"] = found.exchange.mean
    held = phase.memory.state | phase.memory.host
    held["gradients"] += held.pop("gradients of the update", 0)
    return held | sent


def measure(layout: Layout, folder: Path, name: str, counted: Counted) -> Result:
    """One run, by all processes together."""
    from k2train.train.trainer import Trainer

    config, world = dataclasses.replace(config_of(folder, layout), name=name), open_world("cpu")
    paths = RunPaths(folder / "runs" / name)
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, prepared(folder), world=world, paths=paths, say=lambda text: None)
    held: dict[str, float] = {}
    look = partial(_look, trainer, held)
    assert trainer.step()
    with counted.counting():
        assert trainer.step(before_update=look)
    everywhere = gather_json(held | dict(counted.bytes))
    mean = {key: sum(rank.get(key, 0) for rank in everywhere) / world.size for key in set().union(*everywhere)}
    optimizer = type(trainer.engine.optimizer).__name__
    trainer.engine.destroy()
    del trainer, look
    gc.collect()
    return Result(layout, optimizer, figures(planned(config, layout.processes)), mean)


def _look(trainer: Any, held: dict[str, float]) -> None:
    """Bytes of storage, each counted once."""
    parameters, zero = list(trainer.model.parameters()), trainer.engine.optimizer
    weights = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")] + [p.data for p in parameters]
    gradients = [p.grad for p in parameters if p.grad is not None]
    for name in ("averaged_gradients", "fp32_groups_gradients_flat", "grad_partitions_flat_buffer"):
        gradients += _tensors(getattr(zero, name, None))
    flats = [flat for flat, _ in trainer.optimizer.tensors()]
    gradients += [flat.grad for flat in flats if flat.grad is not None]  # with offload
    momenta = [v for flat in flats for key, v in trainer.optimizer.state[flat].items() if key != "step"]
    buckets = {
        t.untyped_storage().data_ptr() for b in getattr(zero, "ipg_buckets", {}).values() for t in _tensors(b.buffer)
    }
    held["weights"] = _storage(weights)
    held["gradients"] = _storage(g for g in gradients if g.untyped_storage().data_ptr() not in buckets)
    held["fp32 masters"], held["momenta"] = _storage(flats), _storage(momenta)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for one in value for tensor in _tensors(one)] if isinstance(value, (list, tuple)) else []


def _storage(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def _work(rank: int, port: int, layouts: Sequence[Layout], folder: Path) -> None:
    size = layouts[0].processes
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    counted = count_collectives()
    import_deepspeed("cpu")
    open_world("cpu")
    for number, layout in enumerate(layouts):
        result = measure(layout, folder, f"{size}-{number}", counted)
        if rank == 0:
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    close_world()


def measure_all(layouts: Sequence[Layout], folder: Path) -> list[Result]:
    """The results, in the order of the layouts, sorted by processes."""
    write_text(folder)
    prepared(folder)
    for _, group in itertools.groupby(layouts, key=lambda layout: layout.processes):
        together = list(group)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        size = together[0].processes
        mp.start_processes(_work, args=(port, together, folder), nprocs=size, start_method="spawn")
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [Result(**values | {"layout": Layout(**values["layout"])}) for values in lines]
