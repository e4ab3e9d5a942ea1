"""The terminal belongs to the run: what libraries print, from Python or from C++, goes to the log file of the rank.

``quiet`` is called before the noisy imports. It works on the file descriptors, so that nothing can print past it, and
hands out what was the terminal until then. A log on a full disk, or a terminal that has gone away, loses what is
written to it; neither can end a run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from k2train.train.failures import forget_failures


class Quiet:
    """The person's streams while descriptors 1 and 2 lead to a log file; ``restore`` undoes it, as does ``with``.

    A run leaves it in force until the process has ended: libraries also print on their way out.
    """

    def __init__(self, log_path: Path) -> None:
        """Redirects. Raises OSError, with nothing changed, if the log cannot be opened."""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._before = sys.stdout, sys.stderr
        for stream in self._before:
            stream.flush()
        # Duplicates are not inherited: a compiler that a library starts has only the log to print to.
        self.out, self.err = (_open(os.dup(fd), like=s) for fd, s in zip((1, 2), self._before, strict=True))
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        # New objects, as the old ones buffer by what the descriptor was when Python started.
        sys.stdout, sys.stderr = (_text(fd, "utf-8", "backslashreplace", closefd=False) for fd in (1, 2))
        self._handler = logging.StreamHandler(sys.stderr)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        self._level = root.level
        root.addHandler(self._handler)
        root.setLevel(logging.INFO)
        self._watches_faults = not faulthandler.is_enabled()
        if self._watches_faults:
            faulthandler.enable(sys.stderr)

    def restore(self) -> None:
        """Puts the terminal back; the person's streams must no longer be used."""
        if self._watches_faults:
            faulthandler.disable()
        root = logging.getLogger()
        root.removeHandler(self._handler)
        root.setLevel(self._level)
        for ours in (sys.stdout, sys.stderr, self.out, self.err):
            ours.flush()
        os.dup2(self.out.fileno(), 1)
        os.dup2(self.err.fileno(), 2)
        sys.stdout, sys.stderr = self._before
        self.out.close()
        self.err.close()

    def __enter__(self) -> Quiet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.restore()


class _Lossy(io.FileIO):
    """A descriptor that drops what it cannot write."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or 0
        return memoryview(data).nbytes


def _text(descriptor: int, encoding: str, errors: str, *, closefd: bool) -> TextIO:
    raw = io.BufferedWriter(_Lossy(descriptor, "w", closefd=closefd))
    return io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=True)


def _open(descriptor: int, *, like: TextIO) -> TextIO:
    # A character that the terminal cannot show must not end a run.
    return _text(descriptor, getattr(like, "encoding", None) or "utf-8", "replace", closefd=True)


def quiet(log_path: Path, *, rank: int, world_size: int) -> Quiet:
    """Sends all output of this process to its log, and forgets failures of earlier starts in the same folder.

    Args:
        log_path: ``<logs>/rank-N.log``; appended to.
        rank: of this process.
        world_size: processes of this start; rank 0 also cleans up after ranks beyond it.

    Raises:
        OSError: the log cannot be written; see ``k2train.paths.explain_oserror``.
    """
    streams = Quiet(log_path)
    print(f"==== started {time.strftime('%Y-%m-%d %H:%M:%S')}, rank {rank} of {world_size}, pid {os.getpid()} ====")
    forget_failures(log_path.parent, rank=rank, world_size=world_size)
    return streams


def import_deepspeed(device: str) -> None:
    """Imports DeepSpeed such that it uses the run's device; to be called before any module that imports it.

    On a CPU it shall use plain gloo: it otherwise builds an extension for shared memory at first use, which takes a
    compiler and time, and dies without.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``.
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # where there is a GPU it would move the model there all the same
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
