"""Commands as jobs of a SLURM cluster, by submitit.

The jobs outlive whoever submitted them: a sweep that is stopped goes on there, and one that is started again waits for
the jobs that it finds, rather than submit their runs once more. ``slurm_job`` in a run's folder has the job's number.
Before its time limit, or when it is preempted, a run saves what it has, and its job goes back into the queue.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import submitit

from k2train.experiments.launch import Launcher
from k2train.paths import RunPaths, atomic_write

LOOK = 2.0  # seconds between two looks at the jobs
REQUEUED = 1000  # times that a job goes back into the queue at its time limit


def slurm(folder: Path, jobs: int, parameters: Mapping[str, str | int]) -> Launcher:
    """A launcher of jobs of one task each.

    Args:
        folder: on a file system that all nodes see: for submitit's files, with all that the jobs print.
        jobs: at a time.
        parameters: of sbatch by submitit's names, as partition, time (minutes) and gpus_per_node.

    Raises:
        ValueError: submitit knows no such parameter.
        RuntimeError: there is no SLURM here.
    """
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=REQUEUED)
    executor.update_parameters(job_name="k2train", array_parallelism=jobs, **parameters)

    def launch(commands: Mapping[Path, Sequence[str]]) -> Generator[tuple[Path, int]]:
        waiting: dict[Path, submitit.Job[int]] = {
            run: found for run in commands if (found := _submitted(run, folder)) is not None
        }
        fresh = [run for run in commands if run not in waiting]
        tasks = [Task(commands[run], RunPaths(run).terminal) for run in fresh]
        for run, job in zip(fresh, executor.map_array(Task.__call__, tasks), strict=True):
            atomic_write(_note(run), f"{job.job_id}\n")
            waiting[run] = job
        while waiting:
            for run, job in list(waiting.items()):
                if job.done():
                    del waiting[run]
                    _note(run).unlink()
                    yield run, _status(job)
            time.sleep(LOOK)

    return launch


class Task:
    """A command that hands the signal before the time limit on, and can be run again; pickled by submitit.

    Args:
        command: to run.
        terminal: the file for what it prints.
    """

    def __init__(self, command: Sequence[str], terminal: Path) -> None:
        self.command, self.terminal = command, terminal
        self._process = 0

    def __call__(self) -> int:
        """Runs the command; returns its status."""
        # SLURM sends its signal to all processes of the job; this one alone is to hear it.
        before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        with open(self.terminal, "wb") as output:
            process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self._process = process.pid
        signal.signal(signal.SIGUSR2, before)
        return process.wait()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before the job is put back: the run saves and ends."""
        os.kill(self._process, signal.SIGUSR1)
        os.waitid(os.P_PID, self._process, os.WEXITED | os.WNOWAIT)  # Popen.wait is on the stack, with its lock
        return submitit.helpers.DelayedSubmission(Task(self.command, self.terminal))


def _note(run: Path) -> Path:
    return RunPaths(run).root / "slurm_job"


def _submitted(run: Path, folder: Path) -> submitit.SlurmJob[int] | None:
    """The job of an earlier start, whatever became of it."""
    note = _note(run)
    return submitit.SlurmJob(folder, note.read_text(encoding="utf-8").strip()) if note.is_file() else None


def _status(job: submitit.Job[int]) -> int:
    """Of the command; that of a killed process if the job was lost with it."""
    return -signal.SIGKILL if job.exception() else job.result()
