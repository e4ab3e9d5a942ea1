"""A file of JSON lines that a full disk leaves whole, and that catches up when there is space again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from k2train.paths import atomic_write, explain_oserror


class Lines:
    """Appends objects to a file. What cannot be written stays in memory and is tried again with the next."""

    def __init__(self, path: Path, *, keep: Callable[[Mapping[str, Any]], bool], say: Callable[[str], None]) -> None:
        """Opens the file, keeping the lines that ``keep`` agrees to; a torn one is dropped.

        Args:
            path: of the file; made if need be.
            keep: which of the objects in it are to stay.
            say: tells the person, once for each time that the file cannot be written.

        Raises:
            OSError: the file cannot be made at all.
        """
        kept = "".join(f"{line}\n" for line in _whole_lines(path) if keep(json.loads(line)))
        atomic_write(path, kept)
        self._path, self._say = path, say
        self._size = len(kept.encode())  # of what is whole
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  (open as long as the run)
        self._pending = b""
        self._refused = False

    def write(self, value: Mapping[str, Any]) -> None:
        """Appends a line, which is the system's when this returns, or is kept for later."""
        self._pending += json.dumps(value).encode() + b"\n"
        self._catch_up()

    def close(self) -> None:
        """Closes the file, after a last attempt at what is still in memory."""
        if self._pending:
            self._catch_up()
        if self._pending:
            self._say(f"{self._path}: {self._pending.count(10)} lines could not be written and are lost")
        self._file.close()

    def _catch_up(self) -> None:
        try:
            self._file.seek(self._size)
            self._file.truncate()  # what an earlier attempt has torn
            rest = memoryview(self._pending)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if not self._refused:
                error.filename = str(self._path)
                self._say(
                    f"{explain_oserror(error, remedy=False)}; the run goes on, and keeps these lines until it can"
                )
            self._refused = True
            return
        self._size += len(self._pending)
        self._pending, self._refused = b"", False


def _whole_lines(path: Path) -> list[str]:
    """A run that was killed may have torn the last line."""
    if not path.exists():
        return []
    whole = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            json.loads(line)
        except json.JSONDecodeError:
            continue
        whole.append(line)
    return whole
