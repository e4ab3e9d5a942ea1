"""A lock on a folder: of several processes, one may write there."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TELL_AFTER = 5.0  # seconds of waiting


@contextmanager
def held_alone(path: Path, *, patience: float, busy: str) -> Iterator[None]:
    """Holds a lock file, which the system releases when the process ends, however it ends.

    Args:
        path: of the file; it says who holds it and stays when it is released.
        patience: seconds to wait for another process to release it; a wait of more than a few is logged.
        busy: what the other one does and what to do, for the message.

    Raises:
        OSError: another process holds it; or the file cannot be made.
    """
    with open(path, "a+", encoding="utf-8") as file:
        begin, told = time.monotonic(), False
        while not _locked(file):
            file.seek(0)
            holder, waited = file.read().strip(), time.monotonic() - begin
            if waited > patience:
                raise OSError(errno.EBUSY, f"another process ({holder}) {busy}", str(path.parent))
            if waited > TELL_AFTER and not told:
                told = True
                logging.getLogger(__name__).warning("%s: waiting for another process (%s)", path.parent, holder)
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        logging.getLogger(__name__).warning("%s: this file system knows no locks; going on without", file.name)
    return True


def is_held(path: Path, *, unknown: bool = True) -> bool:
    """Whether a process holds the lock; ``unknown`` on a file system that knows none."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # a lock cannot be had at all
        return unknown
    return False
