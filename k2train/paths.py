"""Where files live, how they are written so that a reader never sees half of one, and what a failure to do so means."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def cache_dir(override: str | None) -> Path:
    """Where prepared data is kept: ``override``, else ``$XDG_CACHE_HOME/k2train``, else ``~/.cache/k2train``."""
    if override is not None:
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "k2train"


def config_dir() -> Path:
    """The folder of shipped configs: beside the package in a source checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


@dataclass(frozen=True)
class RunPaths:
    """The files of one run, all below ``root``."""

    root: Path

    @property
    def config(self) -> Path:
        """The config that the run was started with."""
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of ``step-N``."""
        return self.root / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer the run was trained with, in Hugging Face's format."""
        return self.root / "tokenizer.json"

    @property
    def logs(self) -> Path:
        """Folder of ``rank-N.log``: all that a process and the libraries in it printed."""
        return self.root / "logs"

    @property
    def lock(self) -> Path:
        """Held by the one process that may write here."""
        return self.root / "lock"

    @property
    def exit_status(self) -> Path:
        """How the last start ended (see ``k2train.status``), for scripts that see torchrun's status alone."""
        return self.root / "exit_status"

    @property
    def report(self) -> Path:
        """The run as a page."""
        return self.root / "report.html"

    @property
    def sample(self) -> Path:
        """Text that the trained model wrote."""
        return self.root / "sample.txt"

    @property
    def samples(self) -> Path:
        """Text that it wrote while it was trained; one JSON object a line."""
        return self.root / "samples.jsonl"

    @property
    def incidents(self) -> Path:
        """Folder of a folder for each step that was out of the ordinary; see ``incident_name``."""
        return self.root / "incidents"

    @property
    def rewinds(self) -> Path:
        """The times that the run has gone back to a checkpoint, and the samples that it has left out since."""
        return self.root / "rewinds.json"

    @property
    def profile(self) -> Path:
        """Folder of traces and memory snapshots of single steps."""
        return self.root / "profile"

    @property
    def trial(self) -> Path:
        """What the run is in a sweep: its settings, and why its last start failed."""
        return self.root / "trial.json"

    @property
    def terminal(self) -> Path:
        """What a run of a sweep would have shown in a terminal."""
        return self.root / "terminal.log"

    @property
    def summary(self) -> Path:
        """The result; it exists once the run is finished."""
        return self.root / "summary.json"


def incident_name(record: Mapping[str, Any]) -> str:
    """The folder of an incident in ``RunPaths.incidents``: a step that a run went back from may be taken again."""
    number = record["incident"].get("rewind")
    return f"{record['step']}-rewind-{number}" if number else str(record["step"])


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a file whole or not at all: aside in the same folder, synced to disk, renamed.

    Raises:
        OSError: as the system gave it; see ``explain_oserror``. The file is then as it was before.
    """
    content = data.encode() if isinstance(data, str) else data
    try:
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        error.filename = str(path)  # that was asked for
        raise
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes renames inside a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


REMEDIES = {
    errno.EACCES: "there is no permission; choose a folder you may write to, or change its permissions",
    errno.EPERM: "there is no permission; choose a folder you may write to, or change its permissions",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOSPC: "the disk is full; free some space and start the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and start the same command again",
    errno.ENOENT: "it does not exist; check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
    errno.EISDIR: "it is a folder, not a file; check the path",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n 4096`",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


def explain_oserror(error: OSError, *, remedy: bool = True) -> str:
    """One sentence: which path, what happened, and, for who has to start again, what to do."""
    reason = REMEDIES.get(error.errno or 0, (error.strerror or str(error) or type(error).__name__).lower())
    if not remedy:
        reason = reason.partition(";")[0]
    return f"{error.filename}: {reason}" if error.filename else reason


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
