"""A step that the monitor refuses, on several ranks: what it leaves behind, and what comes after it."""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from k2train.comm import close_world, gather_json, open_world
from k2train.config import InjectConfig, ScheduleConfig, parse
from k2train.monitor import Monitor
from k2train.paths import RunPaths
from k2train.train.quiet import import_deepspeed
from k2train.train.trainer import Trainer
from tests.distributed.numbers import everywhere, state_of
from tests.distributed.plain import Layout, config_of, prepared, write_text

BEFORE = 18  # steps, enough for the monitor to know what to expect
FAULTS = ("random_tokens", "gradient_x1000", "gradient_nan", "loss_inf")


def left_behind(layout: Layout, folder: Path, name: str) -> dict[str, bool]:
    """Of each fault whether it changed nothing that decides the future; and what else must be true of such steps."""
    after, found = _with_faults(layout, folder, f"{name}-bad")
    gc.collect()
    found["what comes after"] = everywhere(all(map(torch.equal, after, _without(layout, folder, f"{name}-good"))))
    gc.collect()
    return found


def _with_faults(layout: Layout, folder: Path, name: str) -> tuple[list[Tensor], dict[str, bool]]:
    trainer = _trainer(layout, folder, name, dict(enumerate(FAULTS, BEFORE + 1)))
    found: dict[str, bool] = {}
    for _ in range(BEFORE):
        assert trainer.step()
        assert trainer.incident is None
    for fault in FAULTS:
        before, first_sample = state_of(trainer), trainer.state.next_sample
        applied = trainer.step()
        same = all(map(torch.equal, before, state_of(trainer))) and trainer.state.next_sample > first_sample
        found[fault] = everywhere(not applied and same and bool((trainer.clip.gamma == 1).all()))
        found[f"{fault} is told"] = everywhere(
            trainer.incident is not None
            and trainer.incident["incident"]["action"] == "skipped"
            and trainer.incident["step"] == trainer.progress.step
        )
    states = gather_json(trainer.monitor.state_dict())
    found["the same history on all ranks"] = all(state == states[0] for state in states)
    again = Monitor(trainer.config.monitor)
    again.load_state_dict(states[0])
    found["history through JSON"] = again.state_dict() == trainer.monitor.state_dict()
    assert trainer.step()
    assert trainer.incident is None
    trainer.engine.destroy()
    return state_of(trainer), found


def _without(layout: Layout, folder: Path, name: str) -> list[Tensor]:
    trainer = _trainer(layout, folder, name, {})
    for _ in range(BEFORE):
        assert trainer.step()
    trainer.progress.step += len(FAULTS)  # data and learning rate move on
    assert trainer.step()
    trainer.engine.destroy()
    return state_of(trainer)


def _trainer(layout: Layout, folder: Path, name: str, faults: dict[int, str]) -> Trainer:
    paths = RunPaths(folder / "runs" / name)
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    config = config_of(folder, layout)
    config = dataclasses.replace(
        config,
        name=name,
        schedule=parse(ScheduleConfig, {"steps": BEFORE + len(FAULTS) + 1, "batch_ramp": [], "phases": {}}),
        monitor=dataclasses.replace(config.monitor, action="skip"),
        inject=InjectConfig(allow=True, faults={str(step): fault for step, fault in faults.items()}),
    )
    return Trainer(config, prepared(folder), world=open_world("cpu"), paths=paths, say=lambda text: None)


def _work(rank: int, port: int, layouts: Sequence[Layout], folder: Path) -> None:
    size = str(layouts[0].processes)
    os.environ.update(RANK=str(rank), WORLD_SIZE=size, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import_deepspeed("cpu")
    open_world("cpu")
    results = [left_behind(layout, folder, f"run{number}") for number, layout in enumerate(layouts)]
    if rank == 0:
        (folder / "skipped.json").write_text(json.dumps(results))
    close_world()


def run_all(layouts: Sequence[Layout], folder: Path) -> list[dict[str, Any]]:
    """The findings in each layout, which are of as many processes."""
    multiprocessing.set_forkserver_preload(["tests.monitor.skipped", "deepspeed.runtime.zero.muon.muon_optimizer"])
    write_text(folder)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.start_processes(_work, args=(port, layouts, folder), nprocs=layouts[0].processes, start_method="forkserver")
    results: list[dict[str, Any]] = json.loads((folder / "skipped.json").read_text())
    return results
