"""Finding a checkpoint, and telling whether it is whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from k2train.checkpoint.intervals import SEGMENTS, IntervalReader, read_segments
from k2train.checkpoint.manifest import MANIFEST, CheckpointError, Manifest
from k2train.comm import World, gather_json
from k2train.paths import explain_oserror

LATEST, BEST = "latest", "best"  # small files with the name of a folder beside them


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    folder: Path
    manifest: Manifest

    @cached_property
    def reader(self) -> IntervalReader:
        """Access to its tensors."""
        return IntervalReader(self.folder, self.manifest)

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.size for file in self.manifest.files.values())

    def faults(self, *, share: tuple[int, int] = (0, 1)) -> Iterator[str]:
        """Sentences on files that are not as they were written.

        Args:
            share: (rank, size): every file's size is compared, but the hash only of each ``size``-th.
        """
        rank, size = share
        for number, (name, record) in enumerate(self.manifest.files.items()):
            try:
                if (actual := (self.folder / name).stat().st_size) != record.size:
                    yield f"{name} has {actual} bytes instead of {record.size}"
                elif number % size == rank and self.reader.file(name).hash() != record.xxh3_128:
                    yield f"{name} is damaged: its hash is not the one in {MANIFEST}"
            except OSError as error:
                yield explain_oserror(error)
            except CheckpointError as error:
                yield str(error)

    def check_segments(self) -> None:
        """Raises CheckpointError unless the files hold what the tables say, each element of each tensor once."""
        names = [name for name in self.manifest.files if name != SEGMENTS]
        shapes = {tensor.rpartition("/")[0]: record.shape for tensor, record in self.manifest.tensors.items()}
        tensors, tables = read_segments(self.folder, names, shapes)
        if tensors != self.manifest.tensors:
            raise CheckpointError(f"the files hold other tensors than {MANIFEST} says")
        for tensor, table in tables.items():
            if table.tolist() != self.reader.segments(tensor).tolist():
                raise CheckpointError(f"{SEGMENTS} does not say where {tensor} is")


def folder_of(directory: Path, step: int) -> Path:
    """Of the checkpoint of a step."""
    return directory / f"step-{step:08d}"


def steps(directory: Path) -> list[int]:
    """Of all published checkpoints, the newest first."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in directory.glob("step-*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def read_name(path: Path) -> str | None:
    """What ``latest`` or ``best`` says; None if there is no such file."""
    try:
        return path.read_bytes().decode(errors="replace").removesuffix("\n")
    except FileNotFoundError:
        return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint by its folder; its files are not looked at.

    Raises:
        CheckpointError: it is no checkpoint that this version can read; it names the folder.
    """
    try:
        return Checkpoint(folder, Manifest.from_json((folder / MANIFEST).read_bytes().decode(errors="replace")))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except OSError as error:
        raise CheckpointError(explain_oserror(error)) from error


def newest_checkpoint(
    directory: Path, *, world: World, say: Callable[[str], None], until: int | None = None
) -> Checkpoint | None:
    """The newest checkpoint that is whole; called by all ranks together.

    Each rank hashes its share of the files. A damaged checkpoint is passed over, and ``say`` is told why.

    Args:
        directory: the run's checkpoints.
        world: the run's processes.
        say: tells the person a sentence.
        until: steps that it has at most; None: any number.

    Returns:
        None if there are no checkpoints.

    Raises:
        CheckpointError: there are some, but none is whole.
    """
    there, latest = gather_json([steps(directory), read_name(directory / LATEST)])[0]  # one list for all ranks
    if until is not None:
        there = [step for step in there if step <= until]
    for step in there:
        checkpoint, fault = _judge(folder_of(directory, step), world)
        if checkpoint is None:
            say(f"passing over {folder_of(directory, step)}: {fault}")
            continue
        if until is None and latest != checkpoint.folder.name:
            named = "is missing" if latest is None else f"names {latest}"
            say(f"{directory / LATEST} {named}: going by the folders, {checkpoint.folder.name} is the newest whole one")
        return checkpoint
    if there:
        raise CheckpointError(
            f"none of the {len(there)} checkpoints in {directory} is whole, so there is nothing to go on from: put one "
            "back, or begin anew under another name"
        )
    return None


def find_checkpoint(path: Path, *, world: World, say: Callable[[str], None]) -> Checkpoint:
    """What a person means by a path: a checkpoint, or a run or its checkpoints, of which the newest whole one.

    Called by all ranks together.

    Raises:
        CheckpointError: there is none, or the one that is named is not whole.
    """
    if _is_checkpoint(path):
        checkpoint, fault = _judge(path, world)
        if checkpoint is None:
            raise CheckpointError(f"{path} cannot be used: {fault}")
        return checkpoint
    if (found := newest_checkpoint(_directory(path), world=world, say=say)) is None:
        raise _none_in(path)
    return found


def choose_checkpoint(path: Path) -> Checkpoint:
    """What a person means by a path, whole or not: as ``find_checkpoint``, but in one process and without reading.

    Raises:
        CheckpointError: there is none, or its manifest cannot be read.
    """
    if _is_checkpoint(path):
        return open_checkpoint(path)
    directory = _directory(path)
    if not (there := steps(directory)):
        raise _none_in(path)
    return open_checkpoint(folder_of(directory, there[0]))


def _is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).exists() or re.match(r"step-\d+", path.name) is not None


def _directory(path: Path) -> Path:
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _none_in(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} holds no checkpoint: give the folder of a run that has written one, as in runs/first, or one of its "
        "checkpoints, as in runs/first/checkpoints/step-00000100"
    )


def _judge(folder: Path, world: World) -> tuple[Checkpoint | None, str]:
    """The checkpoint if all ranks find it whole, else what the first of them found."""
    checkpoint, fault = None, None
    try:
        checkpoint = open_checkpoint(folder)
        fault = next(checkpoint.faults(share=(world.rank, world.size)), None)
    except CheckpointError as error:
        fault = str(error).removeprefix(f"{folder}: ")
    found = [sentence for sentence in gather_json(fault) if sentence]
    return (None, found[0]) if found else (checkpoint, "")
