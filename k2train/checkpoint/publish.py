"""A checkpoint becomes visible whole or not at all: written aside, hashed, synced, renamed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2train.checkpoint.intervals import Interval, IntervalReader, file_hash, write_intervals
from k2train.checkpoint.manifest import MANIFEST, CheckpointError, FileRecord, Manifest, Segment, TensorRecord
from k2train.comm import World, gather_json, together
from k2train.paths import atomic_write, sync_directory


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose files were found whole."""

    folder: Path
    manifest: Manifest

    def reader(self) -> IntervalReader:
        """Access to its tensors."""
        return IntervalReader(self.folder, self.manifest)


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    intervals: Sequence[Interval],
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Any],
    world: World,
) -> Path:
    """Writes and publishes ``directory/step-N``; called by all ranks together.

    Args:
        directory: the run's checkpoints.
        step: optimizer steps taken.
        intervals: what this rank holds; over all ranks they must tile every tensor.
        shapes: global shape of each name in ``intervals``.
        state: all else that decides the future, fit for JSON; rank 0's is written.
        world: the run's processes.

    Returns:
        The published folder.

    Raises:
        CheckpointError: the intervals of the ranks do not tile a tensor.
        OSError: on the rank that could not write; FailedTogether on the others. Nothing is published then.
    """
    folder = directory / f"step-{step:08d}"
    partial = folder.with_name(folder.name + ".partial")
    with together():
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with together():
        name = f"rank-{world.rank:05d}.safetensors"
        record = write_intervals(partial / name, intervals)
    table = gather_json(
        {
            "file": [name, record.size, record.xxh3_128],
            "segments": [
                [i.tensor, list(shapes[i.name]), str(i.values.dtype).removeprefix("torch."), i.start, len(i.values)]
                for i in intervals
            ],
        }
    )
    with together():
        if world.main:
            manifest = _join(step, table, state)
            atomic_write(partial / MANIFEST, manifest.to_json())
            shutil.rmtree(folder, ignore_errors=True)  # the same step once more, after a resume from an older one
            os.replace(partial, folder)
            sync_directory(directory)
    return folder


def newest_checkpoint(directory: Path, *, world: World, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; called by all ranks together.

    Each rank hashes its share of the files. A damaged checkpoint is passed over, and ``say`` is told why.
    """
    for folder in sorted(directory.glob("step-*"), key=_step, reverse=True):
        if _step(folder) < 0:
            continue
        fault, manifest = None, None
        try:
            manifest = Manifest.from_json((folder / MANIFEST).read_text())
            manifest.check_tiling()
            _check_files(folder, manifest, share=(world.rank, world.size))
        except (CheckpointError, OSError) as error:
            fault = str(error)
        faults = [f for f in gather_json(fault) if f]
        if not faults and manifest is not None:
            return Checkpoint(folder, manifest)
        say(f"passing over {folder}: {faults[0]}")
    return None


def prune(directory: Path, *, keep: int) -> None:
    """Deletes all but the ``keep`` newest checkpoints, and what broken-off writes left; called by one rank."""
    published = sorted((f for f in directory.glob("step-*") if _step(f) >= 0), key=_step)
    for folder in [*published[:-keep], *directory.glob("step-*.partial")]:
        shutil.rmtree(folder, ignore_errors=True)


def _step(folder: Path) -> int:
    found = re.fullmatch(r"step-(\d+)", folder.name)
    return int(found[1]) if found else -1


def _join(step: int, table: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> Manifest:
    """One manifest of what all ranks wrote."""
    files = {entry["file"][0]: FileRecord(entry["file"][1], entry["file"][2]) for entry in table}
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    segments: dict[str, list[Segment]] = {}
    for entry in table:
        for tensor, shape, dtype, start, length in entry["segments"]:
            kinds[tensor] = (tuple(shape), dtype)
            segments.setdefault(tensor, []).append(Segment(entry["file"][0], start, start + length))
    tensors = {
        tensor: TensorRecord(shape, dtype, tuple(sorted(segments[tensor], key=lambda s: s.start)))
        for tensor, (shape, dtype) in kinds.items()
    }
    manifest = Manifest(step, files, tensors, state)
    manifest.check_tiling()
    return manifest


def _check_files(folder: Path, manifest: Manifest, *, share: tuple[int, int]) -> None:
    rank, size = share
    for number, (name, record) in enumerate(manifest.files.items()):
        if (actual := (folder / name).stat().st_size) != record.size:
            raise CheckpointError(f"{name} has {actual} bytes instead of {record.size}")
        if number % size == rank and file_hash(folder / name) != record.xxh3_128:
            raise CheckpointError(f"{name} is damaged: its hash is not the one in the manifest")
