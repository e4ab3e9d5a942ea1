"""The one error of this package, and how a failure of the file system becomes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k2train.paths import explain_oserror


class DataError(ValueError):
    """The data cannot be read, prepared or trusted; the message is one sentence with the way on."""


@contextmanager
def os_errors_explained(about: Path) -> Iterator[None]:
    """Turns an OSError (no permission, full disk, read-only) of the block into a DataError.

    Args:
        about: is named if the error names no file, as when a write finds the disk full.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(about)
        raise DataError(explain_oserror(error)) from error
