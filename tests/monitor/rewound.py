"""A run that goes back, on several ranks, against one that never had the samples that it leaves out."""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from k2train.comm import close_world, open_world
from k2train.config import InjectConfig, RunConfig, ScheduleConfig, parse
from k2train.paths import RunPaths
from k2train.report.records import in_order, read_lines
from k2train.train.errors import RunError
from k2train.train.hooks import Hook
from k2train.train.incidents import Incidents
from k2train.train.metrics import MetricsFile
from k2train.train.quiet import import_deepspeed
from k2train.train.rewind import read_rewinds
from k2train.train.trainer import Trainer
from tests.distributed.numbers import everywhere, state_of
from tests.distributed.plain import Layout, config_of, prepared, write_text

STEPS, BAD, EVERY = 28, 22, 6  # back to step 18
WINDOW, WHOLE = 3, 4  # steps whose samples are left out: some of those since the checkpoint, and all of them


class Killed(Exception):
    """The process has come to its end."""


class Kill(Hook):
    """Ends the run when it has just gone back."""

    def rewound(self, step: int) -> None:
        """Of all ranks alike."""
        raise Killed


def _quiet(text: str) -> None:
    del text


def compared(layout: Layout, folder: Path, name: str, *, killed: bool) -> dict[str, bool]:
    """What must be true of a run that goes back, beside one that never has to; and of one that is killed as it does."""
    window = WHOLE if killed else WINDOW
    config = _config(folder, layout, window)
    spoilt = dataclasses.replace(config, inject=InjectConfig(allow=True, faults={str(BAD): "random_tokens"}))
    back, found = _run(spoilt, folder, f"{name}-back"), {}
    paths = RunPaths(folder / "runs" / f"{name}-back")
    (rewind,) = read_rewinds(paths.rewinds)
    found["to before the window"] = rewind.step == BAD and rewind.to == BAD - WHOLE
    size = config.train.global_batch_size
    found["the window's samples"] = rewind.left_out == ((BAD - window) * size, BAD * size - 1)

    order = dataclasses.replace(config.data.order, skips=(rewind.left_out,))
    never = _run(dataclasses.replace(config, data=dataclasses.replace(config.data, order=order)), folder, f"{name}-no")
    found["as if the samples had never been"] = everywhere(_same(back, never))
    found["losses are recorded of each step"] = list(back[0]) == list(range(1, STEPS + 1))
    incident = json.loads((paths.incidents / f"{BAD}-rewind-1" / "incident.json").read_text())["incident"]
    found["told"] = incident["action"] == "rewound" and incident["left_out"] == list(rewind.left_out)

    if not killed:
        return found
    try:
        _run(spoilt, folder, f"{name}-killed", Kill())
        found["killed"] = False
    except Killed:
        found["killed"] = True
    gc.collect()
    found["killed, and on"] = everywhere(_same(_run(spoilt, folder, f"{name}-killed"), never))
    return found


def too_often(layout: Layout, folder: Path, name: str) -> dict[str, bool]:
    """What must be true of a run that would go back once more than it may."""
    config = _config(folder, layout, WINDOW)
    faults = {str(BAD): "random_tokens", str(BAD + 2): "random_tokens"}
    config = dataclasses.replace(
        config,
        inject=InjectConfig(allow=True, faults=faults),
        monitor=dataclasses.replace(config.monitor, rewinds=1, rewind_window=1),
    )
    try:
        _run(config, folder, name)
    except RunError as error:
        return {"says why": "monitor.rewinds" in str(error)}
    return {"stops": False}


def _run(config: RunConfig, folder: Path, name: str, *more: Hook) -> tuple[Mapping[int, float], list[Tensor]]:
    """The loss of each step as metrics.jsonl has it in the end, and the state."""
    paths = RunPaths(folder / "runs" / name)
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    world = open_world("cpu")
    files = [MetricsFile(paths.metrics, say=_quiet), Incidents(paths.incidents, say=_quiet)] if world.main else []
    trainer = Trainer(
        dataclasses.replace(config, name=name),
        prepared(folder),
        world=world,
        paths=paths,
        say=_quiet,
        hooks=[*files, *more],
    )
    try:
        trainer.train()
        torch.distributed.barrier()
        records, _, _ = in_order(read_lines(paths.metrics.read_text())[0])
        return {record["step"]: record["loss"] for record in records}, state_of(trainer)
    finally:
        trainer.engine.destroy()
        del trainer
        gc.collect()


def _same(a: tuple[Mapping[int, float], list[Tensor]], b: tuple[Mapping[int, float], list[Tensor]]) -> bool:
    return a[0] == b[0] and all(map(torch.equal, a[1], b[1]))


def _config(folder: Path, layout: Layout, window: int) -> RunConfig:
    config = config_of(folder, layout)
    return dataclasses.replace(
        config,
        schedule=parse(ScheduleConfig, {"steps": STEPS, "batch_ramp": [], "phases": {}}),
        checkpoint=dataclasses.replace(config.checkpoint, every=EVERY),
        monitor=dataclasses.replace(config.monitor, action="rewind", rewind_window=window),
    )


def _work(rank: int, port: int, layouts: Sequence[Layout], folder: Path, killed: bool) -> None:
    size = str(layouts[0].processes)
    os.environ.update(RANK=str(rank), WORLD_SIZE=size, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import_deepspeed("cpu")
    open_world("cpu")
    results = [compared(layout, folder, f"run{n}", killed=killed) for n, layout in enumerate(layouts)]
    if killed:
        results[0] |= too_often(layouts[0], folder, "often")
    if rank == 0:
        (folder / "rewound.json").write_text(json.dumps(results))
    close_world()


def run_all(layouts: Sequence[Layout], folder: Path, *, killed: bool) -> list[dict[str, Any]]:
    """The findings in each layout, which are of as many processes; ``killed``: with a run that is, and all faults."""
    multiprocessing.set_forkserver_preload(["tests.monitor.rewound", "deepspeed.runtime.zero.muon.muon_optimizer"])
    write_text(folder)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.start_processes(
        _work, args=(port, layouts, folder, killed), nprocs=layouts[0].processes, start_method="forkserver"
    )
    results: list[dict[str, Any]] = json.loads((folder / "rewound.json").read_text())
    return results
