"""Commands as processes on this machine, so many at a time.

A launcher is called with the commands of runs by the runs' folders, and yields each folder with the status that its
command has ended with, as they end: negative is the number of the signal that killed it, as in ``subprocess``. What a
command prints goes to ``terminal.log`` in its folder. ``k2train.experiments.slurm`` has the launcher of a cluster.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.lock import is_held
from k2train.paths import RunPaths

Launcher = Callable[[Mapping[Path, Sequence[str]]], Generator[tuple[Path, int]]]

LOOK = 0.1  # seconds between two looks at the processes


def local(jobs: int = 1) -> Launcher:
    """A launcher of processes on this machine, which share out its cores and GPUs.

    A folder in which a process of an earlier start still trains waits for it to end. When the launcher is closed, its
    processes are asked to stop, and waited for: each run then saves what it has.

    Args:
        jobs: at a time.
    """

    def launch(commands: Mapping[Path, Sequence[str]]) -> Generator[tuple[Path, int]]:
        waiting, places = list(commands), _places(jobs)
        running: dict[Path, tuple[subprocess.Popen[bytes], _Place]] = {}
        try:
            while waiting or running:
                free = [folder for folder in waiting if not is_held(RunPaths(folder).lock, unknown=False)]
                for folder in free[: len(places)]:
                    waiting.remove(folder)
                    place = places.pop(0)
                    running[folder] = place.start(folder, commands[folder]), place
                for folder, (process, place) in list(running.items()):
                    if (status := process.poll()) is not None:
                        del running[folder]
                        places.append(place)
                        yield folder, status
                time.sleep(LOOK)
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.wait()

    return launch


@dataclass(frozen=True)
class _Place:
    """A part of the machine."""

    cores: Sequence[int]
    gpus: Sequence[str]

    def start(self, folder: Path, command: Sequence[str]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else None
        with open(RunPaths(folder).terminal, "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us to hand on, once
            )
        with contextlib.suppress(ProcessLookupError):  # it has ended at once
            os.sched_setaffinity(process.pid, self.cores)
        return process


def _places(jobs: int) -> list[_Place]:
    """The machine in so many parts; where there are too few cores or GPUs for that, all are everybody's."""
    cores, gpus = sorted(os.sched_getaffinity(0)), _gpus()
    return [_Place(cores[k::jobs] or cores, gpus[k::jobs] or gpus) for k in range(jobs)]


def _gpus() -> list[str]:
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(k) for k, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]
