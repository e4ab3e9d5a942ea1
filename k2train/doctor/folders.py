"""Whether all ranks write to a folder and see what the others wrote, and how fast it is written and read."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from k2train.comm import World, gather_json
from k2train.paths import explain_oserror

SAMPLE = 2**26  # bytes that one rank of each node writes


@dataclass(frozen=True)
class Folder:
    """Of one rank."""

    path: str
    fault: str | None  # why it cannot be written to
    unseen: tuple[int, ...]  # ranks that wrote what this one does not see
    free: int  # bytes
    written: float | None = None  # bytes a second that reach the disk; None: another rank of the node measures that
    read: float | None = None  # bytes a second that come from it, not from this host's memory


def probe(path: Path, world: World) -> list[Folder]:
    """What all ranks found; called by all of them together. What is written is deleted again."""
    (name, *_) = gather_json(uuid.uuid4().hex)
    aside = path / f".doctor-{name}"
    fault, rates = None, dict[str, float]()
    try:
        aside.mkdir(parents=True, exist_ok=True)
        (aside / str(world.rank)).touch()
    except OSError as error:
        fault = explain_oserror(error)
    wrote = [rank for rank, there in enumerate(gather_json(fault is None)) if there]
    unseen = tuple(rank for rank in wrote if not (aside / str(rank)).exists()) if fault is None else ()
    if fault is None and world.local_rank == 0:
        try:
            rates = _rates(aside / f"sample-{world.rank}")
        except OSError as error:
            fault = explain_oserror(error)
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    found = gather_json(asdict(Folder(str(path), fault, unseen, shutil.disk_usage(there).free, **rates)))
    with contextlib.suppress(OSError):  # another rank was faster
        shutil.rmtree(aside)
    return [Folder(**each) for each in found]


def _rates(path: Path) -> dict[str, float]:
    """Of a file that is written to the disk, dropped from this host's page cache, and read again.

    A server's own cache, and a file system in memory, read as fast as they do.
    """
    data = os.urandom(2**20)
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(SAMPLE // len(data)):
            file.write(data)
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with path.open("rb", buffering=0) as file:
        dropped = time.perf_counter()
        while file.read(len(data)):
            pass
    return {"written": SAMPLE / (written - begin), "read": SAMPLE / (time.perf_counter() - dropped)}
