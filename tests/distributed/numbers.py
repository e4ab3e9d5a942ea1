"""What a step computes: held against a plain loop over the plan, with uneven labels, growing batches and phases; and
that a step which is not finite leaves no trace.

All runs of as many processes are done by one process group in turn, as in ``layouts``.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from k2train.checkpoint import newest_checkpoint
from k2train.comm import close_world, open_world
from k2train.config import RunConfig, ScheduleConfig, parse
from k2train.data import DataPhase, TrainStream, open_dataset
from k2train.data.reader import Batch
from k2train.model import build_model, update_bias
from k2train.paths import RunPaths
from k2train.train.engine import build_clip, build_optimizer
from k2train.train.phases import build_plan
from k2train.train.quiet import import_deepspeed
from k2train.train.trainer import Trainer
from tests.distributed.plain import Layout, config_of, prepared

YARN = {"factor": 4, "original_max_position_embeddings": 12, "beta_fast": 1, "beta_slow": 1}
SCHEDULES: dict[str, dict[str, Any]] = {
    "uneven": {"steps": 3, "batch_ramp": [], "phases": {}},  # labels; see ``uneven``
    "long": {"steps": 8, "batch_ramp": [], "phases": {}},  # a step for each of FAULTS, and one before and after
    "phases": {
        "batch_ramp": [[4, 150]],  # two steps of 96 tokens
        "phases": {
            "short": {"steps": 3, "decay_fraction": 1.0, "decay_shape": "linear", "final_lr_ratio": 0.5},
            "long": {
                "steps": 2,
                "sequence_length": 40,
                "global_batch_size": 4,
                "micro_batch_size": 1,
                "rope_scaling": YARN | {"mscale": 1, "mscale_all_dim": 1},
            },
        },
    },
}


@dataclass(frozen=True)
class Case:
    """A schedule in a layout."""

    schedule: str
    layout: Layout

    def config(self, folder: Path) -> RunConfig:
        """Of the run."""
        schedule = parse(ScheduleConfig, SCHEDULES[self.schedule])
        return dataclasses.replace(config_of(folder, self.layout), schedule=schedule)


@dataclass(frozen=True)
class Outcome:
    """Of each step; and the weights at the end."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def uneven(samples: Callable[[range], Batch]) -> Callable[[range], Batch]:
    """Takes labels away, so that samples have from none of them to all."""

    def masked(numbers: range) -> Batch:
        tokens, labels, starts = samples(numbers)
        labels = labels.clone()  # a single row shares its memory with the tokens
        for row, number in enumerate(numbers):
            labels[row, : labels.shape[1] * (number * 5 % 9) // 8] = -100
        return tokens, labels, starts

    return masked


def plain(case: Case, folder: Path) -> Outcome:
    """One process, no DeepSpeed, the whole batch at once."""
    config = case.config(folder)
    dataset, plan = open_dataset(prepared(folder)), build_plan(config)
    model = build_model(dataclasses.replace(config.model, vocab_size=dataset.padded_vocab_size), seed=config.seed)
    clip = build_clip(config.optim, model)
    optimizer = build_optimizer(config.optim, model, clip, expert_group="", device=torch.device("cpu"))

    phases = [DataPhase(phase.samples, phase.sequence_length) for phase in plan.phases]
    samples = TrainStream(dataset, phases, seed=config.seed).batch
    losses, norms = [], []
    for step in map(plan.step, range(plan.steps)):
        numbers = range(step.first_sample, step.first_sample + step.samples)
        tokens, labels, starts = (uneven(samples) if case.schedule == "uneven" else samples)(numbers)
        model.set_rope_scaling(step.phase.rope_scaling)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * step.lr_ratio
        loss_BT, balance = model(tokens, labels, starts)
        loss = loss_BT.sum() / (labels >= 0).sum()
        (loss + balance).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
        for _, moe in model.moe_layers():
            bias, loads = moe.gate.e_score_correction_bias, moe.gate.loads
            bias.copy_(update_bias(bias, loads, rate=config.model.router_bias_rate))
            loads.zero_()
        losses.append(loss.item())
    return Outcome(losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()})


def train(case: Case, folder: Path, name: str) -> dict[str, float]:
    """The run by the Trainer, on all processes; how far it is from the plain one, at most."""
    trainer = _trainer(case, folder, name)
    if case.schedule == "uneven":
        samples = uneven(trainer.stream.batch)
        trainer.stepper._batches = lambda step: [
            samples(part) for part in step.micro_batches(rank=trainer.world.rank, processes=trainer.world.size)
        ]
    expected = torch.load(folder / f"{case.schedule}.pt", weights_only=True)
    records = []
    while trainer.progress.step < trainer.plan.steps:
        assert trainer.step()
        records.append(trainer.record())
    trainer.save()
    trainer.saver.wait()
    checkpoint = newest_checkpoint(trainer.paths.checkpoints, world=trainer.world, say=print)
    assert checkpoint is not None
    reader = checkpoint.reader
    apart = {n: (reader.read(n, "master") - w).abs().max() for n, w in expected["weights"].items()}
    found = {
        "loss": max(abs(r["loss"] - x) for r, x in zip(records, expected["losses"], strict=True)),
        "norm": max(abs(r["grad_norm"] / x - 1) for r, x in zip(records, expected["norms"], strict=True)),
        "weight": float(max(apart.values())),
    }
    trainer.engine.destroy()
    return found


# ---- steps that are not finite


def no_trace(layout: Layout, folder: Path, name: str) -> dict[str, bool]:
    """Of each way in which a step is not finite on the last rank alone, in its first micro-batch: whether it left none.

    And whether what comes after is, bit for bit, what comes without those steps.
    """
    after, found = _with_faults(layout, folder, f"{name}-bad")
    gc.collect()  # a second engine of stage 3 beside the first would not do
    found["what comes after"] = everywhere(all(map(torch.equal, after, _without(layout, folder, f"{name}-good"))))
    gc.collect()
    return found


def _with_faults(layout: Layout, folder: Path, name: str) -> tuple[list[Tensor], dict[str, bool]]:
    trainer, found = _trainer(Case("long", layout), folder, name), {}
    assert trainer.step()
    before, random = state_of(trainer), torch.get_rng_state()
    trainer.validate(whole=False)
    same = all(map(torch.equal, before, state_of(trainer))) and torch.equal(random, torch.get_rng_state())
    found["validation"] = everywhere(same and trainer.model.training)
    for kind in FAULTS:
        before = state_of(trainer)
        with _faulty(trainer, kind):
            applied = trainer.step()
        same = all(map(torch.equal, before, state_of(trainer)))
        found[kind] = everywhere(not applied and same and bool((trainer.clip.gamma == 1).all()))
    record = trainer.record()
    found["counted"] = record["skipped_steps"] == len(FAULTS) == record["steps"] - 1
    found["loss of the others"] = math.isfinite(record["loss"])
    assert trainer.step()
    trainer.engine.destroy()
    return state_of(trainer), found


def _without(layout: Layout, folder: Path, name: str) -> list[Tensor]:
    trainer = _trainer(Case("long", layout), folder, name)
    assert trainer.step()
    trainer.progress.step += len(FAULTS)  # data and learning rate move on
    assert trainer.step()
    trainer.engine.destroy()
    return state_of(trainer)


FAULTS = ("gradient nan", "gradient inf", "loss nan", "loss inf", "logit nan", "logit inf")


@contextmanager
def _faulty(trainer: Trainer, kind: str) -> Iterator[None]:
    what, value = kind.split()
    bad, calls = (float(value), [])
    if trainer.world.rank < trainer.world.size - 1:
        yield
        return
    attention = trainer.model.layers[0].self_attn

    def once() -> bool:
        calls.append(1)
        return len(calls) == 1

    def spoil_loss(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        # Added, so that the gradient by itself stays finite.
        return (output[0] + torch.tensor(bad), output[1]) if once() else output

    def spoil_logit(layer: nn.Module, _: Any, __: Any) -> None:
        if once():
            layer.max_logits[0] = bad

    handle = {
        "gradient": lambda: attention.o_proj.weight.register_hook(lambda g: g * bad if once() else g),
        "loss": lambda: trainer.model.register_forward_hook(spoil_loss),
        "logit": lambda: attention.register_forward_hook(spoil_logit),
    }[what]()
    yield
    handle.remove()
    assert calls


def state_of(trainer: Trainer) -> list[Tensor]:
    """All that decides the future on this rank."""
    held = [trainer.clip.cumulative, *(layer.max_logits for _, layer in trainer.model.attention_layers())]
    held += [b for _, moe in trainer.model.moe_layers() for b in (moe.gate.e_score_correction_bias, moe.gate.loads)]
    held += [getattr(p, "ds_tensor", p) for p in trainer.model.parameters()]
    for flat, _ in trainer.optimizer.tensors():
        held += [flat, *trainer.optimizer.state[flat].values()]
    return [tensor.detach().clone() for tensor in held]


# ---- processes


def _trainer(case: Case, folder: Path, name: str) -> Trainer:
    paths = RunPaths(folder / "runs" / name)
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(case.config(folder), name=name)
    return Trainer(config, prepared(folder), world=open_world("cpu"), paths=paths, say=lambda text: None)


def everywhere(fact: bool) -> bool:
    agreed = torch.tensor(int(fact))
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed)


def _work(rank: int, port: int, size: int, cases: Sequence[Case], layouts: Sequence[Layout], folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import_deepspeed("cpu")
    open_world("cpu")
    results: dict[str, Any] = {}
    for number, case in enumerate(cases):
        results[repr(case)] = train(case, folder, f"{size}-{number}")
        gc.collect()
    for number, layout in enumerate(layouts):
        results[repr(layout)] = no_trace(layout, folder, f"{size}-veto-{number}")
    if rank == 0:
        (folder / f"numbers-{size}.json").write_text(json.dumps(results))
    close_world()


def run_all(size: int, cases: Sequence[Case], layouts: Sequence[Layout], folder: Path) -> dict[str, Any]:
    """The results, by what was run, of as many processes; the folder holds the corpus."""
    for case in cases:
        if not (path := folder / f"{case.schedule}.pt").exists():
            torch.save(dataclasses.asdict(plain(case, folder)), path)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.start_processes(_work, args=(port, size, cases, layouts, folder), nprocs=size, start_method="forkserver")
    found_results: dict[str, Any] = json.loads((folder / f"numbers-{size}.json").read_text())
    return found_results
