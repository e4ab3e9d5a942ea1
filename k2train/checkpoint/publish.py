"""A checkpoint becomes visible whole or not at all: written aside by all ranks, hashed, synced, renamed."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from k2train.checkpoint.find import BEST, LATEST, folder_of, read_name, steps
from k2train.checkpoint.intervals import SEGMENTS, DeferredInterval, Interval, read_segments, write_intervals
from k2train.checkpoint.manifest import MANIFEST, CheckpointError, FileRecord, Manifest
from k2train.checkpoint.safetensors_file import write_safetensors
from k2train.comm import World, gather_json
from k2train.paths import atomic_write, explain_oserror, sync_directory
from k2train.units import memory

# Room for headers, tables and the manifest, beside the tensors.
SPARE = 1 << 22


class SaveError(CheckpointError):
    """The disk did not take a checkpoint; nothing was published, and another try may succeed."""


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    intervals: Sequence[Interval | DeferredInterval],
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Any],
    world: World,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes and publishes ``directory/step-N``, and then ``directory/latest``; called by all ranks together.

    Args:
        directory: the run's checkpoints; on a disk that all ranks see.
        step: optimizer steps taken.
        intervals: what this rank holds; over all ranks they must tile every tensor.
        shapes: global shape of each name in ``intervals``; one that is not here is flat and in one piece.
        state: all else that decides the future, fit for JSON; rank 0's is written.
        world: the run's processes.
        group: all of them, to agree in; a group of its own if the caller is a thread of its own.

    Returns:
        The published folder.

    Raises:
        SaveError: a rank could not write. All ranks raise the same.
        CheckpointError: the intervals of the ranks do not tile a tensor, or the ranks do not see the same disk.
    """
    folder = folder_of(directory, step)
    partial = folder.with_name(folder.name + ".partial")
    needed = sum(gather_json(sum(i.values.nbytes for i in intervals), group=group))
    try:
        with _agreed(step, group):
            if world.main:
                directory.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
                check_space(directory, needed)
                partial.mkdir()
        with _agreed(step, group):
            _check_shared(partial, writer="rank 0")
            name = f"rank-{world.rank:05d}.safetensors"
            record = write_intervals(partial / name, intervals)
        written = gather_json([name, record.size, record.xxh3_128, socket.gethostname()], group=group)
        with _agreed(step, group):
            if world.main:
                for file, _, _, host in written:
                    _check_shared(partial / file, writer=host)
                tensors, segments = read_segments(partial, [file for file, *_ in written], shapes)
                files = {file: FileRecord(length, digest) for file, length, digest, _ in written}
                files[SEGMENTS] = write_safetensors(partial / SEGMENTS, segments)
                atomic_write(partial / MANIFEST, Manifest(step, files, tensors, state).to_json())
                _publish(partial, folder)
    except CheckpointError:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise
    return folder


def check_space(directory: Path, needed: int) -> None:
    """Raises SaveError if ``needed`` bytes do not fit on the disk of ``directory``."""
    if (free := shutil.disk_usage(directory).free) < needed + SPARE:
        raise SaveError(
            f"a checkpoint takes {memory(needed)} and the disk of {directory} has {memory(free)} free: make room, "
            "or keep fewer with checkpoint.keep"
        )


def mark_best(directory: Path, step: int) -> None:
    """Names the checkpoint of a step as the best one, which ``prune`` then leaves alone; called by one rank."""
    atomic_write(directory / BEST, folder_of(directory, step).name + "\n")


def prune(directory: Path, *, keep: int, every: int | None = None, since: float | None = None) -> None:
    """Deletes checkpoints that are too old, and what broken-off writes left; called by one rank.

    Args:
        directory: the run's checkpoints.
        keep: the newest of them stay.
        every: those of steps that it divides stay.
        since: those written after this time (seconds since the epoch) stay.
    """
    best = read_name(directory / BEST)
    for step in steps(directory)[keep:]:
        folder = folder_of(directory, step)
        young = since is not None and folder.stat().st_mtime > since
        if not (young or folder.name == best or (every and step % every == 0)):
            shutil.rmtree(folder, ignore_errors=True)
    for leftover in (*directory.glob("step-*.partial"), *directory.glob("step-*.replaced")):
        shutil.rmtree(leftover, ignore_errors=True)


def forget(directory: Path, forgotten: Sequence[int], *, latest: int) -> None:
    """Deletes checkpoints that the run has gone back behind; called by one rank.

    Args:
        directory: the run's checkpoints.
        forgotten: their steps.
        latest: the step of the one that is now the newest.
    """
    atomic_write(directory / LATEST, folder_of(directory, latest).name + "\n")
    for step in forgotten:
        folder = folder_of(directory, step)
        if read_name(directory / BEST) == folder.name:
            (directory / BEST).unlink()
        shutil.rmtree(folder)


def _publish(partial: Path, folder: Path) -> None:
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():  # the same step once more
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
    sync_directory(partial)
    os.replace(partial, folder)
    sync_directory(folder.parent)
    atomic_write(folder.parent / LATEST, folder.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)


def _check_shared(path: Path, *, writer: str) -> None:
    """Raises CheckpointError unless this rank sees what another one wrote."""
    if not path.exists():
        raise CheckpointError(
            f"{path}, written by {writer}, is not there on {socket.gethostname()}: runs_dir must be on a disk that all "
            "nodes share (NFS, Lustre, ...), as any of them may read any part of a checkpoint"
        )


@contextmanager
def _agreed(step: int, group: dist.ProcessGroup | None) -> Iterator[None]:
    """A block that all ranks pass or none: if it fails on any, all raise what the first of them says.

    Like ``k2train.comm.together``, but the error is the same everywhere, so that all can go on alike.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, it is raised again below
        failure = error
    told = gather_json(
        None if failure is None else [isinstance(failure, OSError | SaveError), _sentence(failure)], group=group
    )
    for rank, found in enumerate(told):
        if found is not None:
            disk, sentence = found
            speaker = f"rank {rank}: " if len(told) > 1 else ""
            kind = SaveError if disk else CheckpointError
            raise kind(f"the checkpoint of step {step} was not saved: {speaker}{sentence}") from failure


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        return explain_oserror(error)
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
