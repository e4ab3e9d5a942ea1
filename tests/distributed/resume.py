"""Checkpoints of every layout, read by others: the measurement, and the table of docs/resume.md.

A writer trains five steps, saves while it goes on, and takes ten more. A reader begins with that checkpoint in its own
layout, saves it again before it does anything, and takes the same ten steps. What it saved must be what it read, to the
last bit; the ten steps must be the writer's, to the last bit in the same layout and within rounding in another.

    python -m tests.distributed.resume docs/resume.md     # all of it, some 10 minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import multiprocessing
import os
import platform
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from k2train.checkpoint import Checkpoint, folder_of, open_checkpoint
from k2train.comm import World, close_world, open_world
from k2train.config import RunConfig
from k2train.data import open_dataset
from k2train.model import build_model
from k2train.paths import RunPaths
from k2train.train.hooks import Hook
from k2train.train.quiet import import_deepspeed
from k2train.train.trainer import Trainer
from tests.distributed.plain import Layout, config_of, prepared, write_text

SAVED, MORE = 5, 10
TIMES = ("tokens_per_second", "elapsed", "seconds", "utilisation", "memory")  # what may differ in a step's record


@dataclass(frozen=True)
class Job:
    """A writer, or a reader of what another layout wrote."""

    layout: Layout
    source: Layout | None = None

    @property
    def name(self) -> str:
        """Of the run."""
        return _name(self.layout) if self.source is None else f"{_name(self.layout)}-from-{_name(self.source)}"


@dataclass(frozen=True)
class Result:
    """How a reader went on, beside the writer."""

    layout: Layout
    source: Layout
    state_exact: bool  # all masters, momenta, biases and counters, as soon as they were read
    same_records: bool  # of all steps, to the last bit
    same_weights: bool  # after them, to the last bit
    drift: float  # ||W - W'|| / ||W' - W_0|| after them
    loss: float  # largest difference of a step's loss


def _name(layout: Layout) -> str:
    own = f"-{layout.own}" if layout.own else ""
    return f"w{layout.processes}-ep{layout.expert_parallel}-z{layout.zero_stage}-{layout.precision}{own}"


# ---- which layouts


def valid() -> list[Layout]:
    """World 1, 2, 4 x expert parallelism 1, 2, 4 x stage 1, 2, 3, without what is refused."""
    return [layout for layout in _all() if not _refusals(layout)]


def refused() -> list[tuple[Layout, str]]:
    """The others, and why."""
    return [(layout, " ".join(_refusals(layout))) for layout in _all() if _refusals(layout)]


def _all() -> Iterator[Layout]:
    for processes, expert_parallel, stage in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 3)):
        yield Layout(processes, expert_parallel, stage)


@cache
def _refusals(layout: Layout) -> tuple[str, ...]:
    config = config_of(Path("."), dataclasses.replace(layout, expert_parallel=1))
    parallel = dataclasses.replace(config.parallel, expert_parallel=layout.expert_parallel)
    return tuple(dataclasses.replace(config, parallel=parallel).check_world(layout.processes))


AXES = ("processes", "expert_parallel", "zero_stage")


def axis_of(source: Layout, layout: Layout) -> str | None:
    """The axis in which alone two layouts differ."""
    differ = [axis for axis in AXES if getattr(source, axis) != getattr(layout, axis)]
    return differ[0] if len(differ) == 1 else None


def readers() -> list[Job]:
    """Each layout into itself and three others, so that every change of one axis alone occurs in both directions."""
    layouts, seen, found = valid(), set(), []
    for source in layouts:
        found.append(Job(source, source))
        others = {}
        for layout in layouts:
            if axis := axis_of(source, layout):
                others[layout] = (axis, getattr(source, axis), getattr(layout, axis))
        # Changes that did not occur yet come first, then one of each axis.
        for _ in range(3):
            used = {others[job.layout][0] for job in found if job.source == source and job.layout in others}
            left = [layout for layout in others if Job(layout, source) not in found]
            chosen = min(left, key=lambda layout: (others[layout] in seen, others[layout][0] in used))
            seen.add(others[chosen])
            found.append(Job(chosen, source))
        everything = [layout for layout in layouts if all(getattr(layout, a) != getattr(source, a) for a in AXES)]
        found += [Job(layout, source) for layout in everything[:1]]
    for precise in layouts:
        if precise.processes < 4:
            rough = dataclasses.replace(precise, precision="bf16")
            found.append(Job(rough, rough))
    return found


# ---- the runs


def config_for(job: Job, folder: Path) -> RunConfig:
    """Of a writer or a reader."""
    config = config_of(folder, job.layout)
    schedule = dataclasses.replace(config.schedule, steps=SAVED + MORE)
    source = "auto" if job.source is None else str(_saved(folder, Job(job.source)))
    return dataclasses.replace(config, name=job.name, schedule=schedule, resume=source)


def _saved(folder: Path, job: Job, step: int = SAVED) -> Path:
    return folder_of(RunPaths(folder / "runs" / job.name).checkpoints, step)


class Place(Hook):
    """Remembers the rank that it was on."""

    def __init__(self, rank: int) -> None:
        self.rank, self.before = rank, -1

    def state_dict(self) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.rank}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What it was."""
        self.before = state["rank"]


def carry_out(job: Job, folder: Path, world: World) -> None:
    """A job, by all processes together."""
    paths = RunPaths(folder / "runs" / job.name)
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    config = config_for(job, folder)
    place = Place(world.rank)
    trainer = Trainer(config, prepared(folder), world=world, paths=paths, say=lambda text: None, hooks=[place])
    assert trainer.progress.step == (0 if job.source is None else SAVED)
    if job.source is not None:  # each rank has its own back, or where there were others that of rank 0
        assert place.before == (world.rank if job.source.processes == world.size else 0)
    while trainer.progress.step < SAVED:
        trainer.step()
    if job.source is None:  # else there is nothing to tell yet
        trainer.record()
    trainer.save()
    records = []
    for _ in range(MORE):
        trainer.saver.check()
        applied = trainer.step()
        records.append(trainer.record() | {"applied": applied})
    trainer.saver.save()
    trainer.saver.wait()
    if world.main:
        _records(folder, job).write_text(json.dumps(records))
    trainer.engine.destroy()
    del trainer
    gc.collect()


def _records(folder: Path, job: Job) -> Path:
    return folder / f"{job.name}.json"


def _work(rank: int, port: int, jobs: Sequence[Job], folder: Path) -> None:
    size = jobs[0].layout.processes
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import_deepspeed("cpu")
    world = open_world("cpu")
    for job in jobs:
        carry_out(job, folder, world)
    close_world()


def measure(jobs: Sequence[Job], folder: Path) -> list[Result]:
    """Carries out jobs in their order, writers before their readers; the results of the readers.

    Args:
        jobs: what is to be done; neighbours of as many processes share them.
        folder: of their own, with room for some megabytes a job.
    """
    folder.mkdir(parents=True, exist_ok=True)
    multiprocessing.set_forkserver_preload([__name__, "deepspeed.runtime.zero.muon.muon_optimizer"])
    write_text(folder)
    prepared(folder)
    for _, group in itertools.groupby(jobs, key=lambda job: job.layout.processes):
        together = list(group)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        size = together[0].layout.processes
        mp.start_processes(_work, args=(port, together, folder), nprocs=size, start_method="forkserver")
    start = _start(folder)
    return [compare(job, folder, start) for job in jobs if job.source is not None]


def _start(folder: Path) -> dict[str, Tensor]:
    """The weights that all runs begin with."""
    path = folder / "start.safetensors"
    if not path.exists():
        config, dataset = config_of(folder, Layout(1)), open_dataset(prepared(folder))
        model = build_model(dataclasses.replace(config.model, vocab_size=dataset.padded_vocab_size), seed=config.seed)
        save_file({name: p.detach().clone() for name, p in model.named_parameters()}, path)
    return load_file(path)


def compare(job: Job, folder: Path, start: dict[str, Tensor]) -> Result:
    """A reader with the writer of what it read."""
    assert job.source is not None
    writer = Job(job.source)
    there, here = (open_checkpoint(_saved(folder, each)) for each in (writer, job))
    ended, found = (open_checkpoint(_saved(folder, each, SAVED + MORE)) for each in (writer, job))
    expected, records = (json.loads(_records(folder, each).read_text()) for each in (writer, job))
    apart = moved = 0.0
    for name, first in start.items():
        wanted = ended.reader.read(name, "master")
        apart += (found.reader.read(name, "master") - wanted).norm().item() ** 2
        moved += (wanted - first).norm().item() ** 2
    return Result(
        job.layout,
        job.source,
        state_exact=same_state(there, here, generators=job.layout.processes == job.source.processes),
        same_records=[_timeless(r) for r in records] == [_timeless(r) for r in expected],
        same_weights=same_state(ended, found, generators=False),
        drift=(apart / moved) ** 0.5,
        loss=max(abs(a["loss"] - b["loss"]) for a, b in zip(records, expected, strict=True)),
    )


def same_state(a: Checkpoint, b: Checkpoint, *, generators: bool) -> bool:
    """Whether all tensors of two checkpoints are the same to the last bit, and the numbers beside them.

    Args:
        a: one of them.
        b: the other.
        generators: also what each process keeps of its own, its random generators and its hooks' state.
    """
    tensors = [
        {name for name in each.manifest.tensors if generators or not name.endswith(("/generators", "/hooks"))}
        for each in (a, b)
    ]
    if tensors[0] != tensors[1] or len(tensors[0]) < 50:
        return False
    for tensor in tensors[0]:
        name, _, key = tensor.rpartition("/")
        if not torch.equal(a.reader.read(name, key).view(torch.uint8), b.reader.read(name, key).view(torch.uint8)):
            return False
    return _numbers(a) == _numbers(b)


def _numbers(checkpoint: Checkpoint) -> dict[str, Any]:
    state = checkpoint.manifest.state
    return {
        key: {k: v for k, v in value.items() if k not in TIMES} if isinstance(value, dict) else value
        for key, value in state.items()
        if key not in ("config", "machine")
    }


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


# ---- the table


def every_job() -> list[Job]:
    """All writers and readers; those of as many processes together, as starting processes is what takes time."""
    reading = readers()
    writing = {Job(job.source): None for job in reading if job.source}
    by_size = lambda job: job.layout.processes  # noqa: E731
    return [*sorted(writing, key=by_size), *sorted(reading, key=by_size)]


def table(results: Sequence[Result]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| written by | read by | changed | state | ten steps | drift | loss |"
    yield "| --- " * 7 + "|"
    for r in results:
        changed = [a.replace("_", " ") for a in AXES if getattr(r.layout, a) != getattr(r.source, a)]
        yield (
            f"| {_name(r.source)} | {_name(r.layout)} | {', '.join(changed) or 'nothing'} "
            f"| {'exact' if r.state_exact else 'NOT EXACT'} "
            f"| {'to the last bit' if r.same_records and r.same_weights else 'to rounding'} "
            f"| {r.drift:.1e} | {r.loss:.1e} |"
        )
    yield ""
    yield "| refused | why |"
    yield "| --- | --- |"
    for layout, why in refused():
        yield f"| {_name(layout)} | {why} |"


def main() -> None:
    """Measures all and writes the tables after the mark of a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="whose lines after '<!-- table -->' are replaced")
    arguments = parser.parse_args()
    text, mark, _ = arguments.document.read_text().partition("<!-- table -->\n")
    assert mark, f"{arguments.document} has no line <!-- table -->"
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(every_job(), Path(folder))
    minutes = (time.perf_counter() - begin) / 60
    import deepspeed

    lines = [
        f"{len({r.source for r in results})} layouts written, {len(results)} readings in {minutes:.0f} minutes; torch "
        f"{torch.__version__}, DeepSpeed {deepspeed.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, a thread a process.",
        "",
        *table(results),
    ]
    arguments.document.write_text(text + mark + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
