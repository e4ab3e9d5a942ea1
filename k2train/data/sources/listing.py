"""Which files belong to a source, found without reading them.

A corpus is a listing, sorted by origin (the path relative to its root, with forward slashes): the same files give the
same corpus on any machine, and a listing alone tells whether anything has changed.

Patterns are those of ``fnmatch`` on the origin, where ``*`` also matches slashes: a file belongs to the corpus if one
of ``include`` matches it and none of ``exclude`` does. What belongs to it and cannot be used is counted under its
reason and never stops the rest; see ``Skip``.
"""

from __future__ import annotations

import errno
import os
import platform
import stat
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

from k2train.config import SourceConfig
from k2train.data.errors import DataError, os_errors_explained


class Skip(Enum):
    """Why what was found is no document of the data set."""

    UNREADABLE = "no permission, a broken link, or gone since it was listed"
    NOT_A_FILE = "a pipe, socket or device"
    FOLDER_LINK = "a link to a folder, which could lead in circles"
    EMPTY = "empty"
    BINARY = "binary: it has a NUL byte"
    NOT_UTF8 = "not UTF-8"
    SHORT = "shorter than min_characters"
    LONG = "longer than max_characters"
    UNMATCHED = "without a match of match"
    REJECTED = "with a match of reject"
    COPY = "byte for byte a copy of an earlier one"
    NEAR_COPY = "nearly a copy of an earlier one"


# What each kind reads where ``include`` is null; compressed or not.
ENDINGS = {
    "folder": ("",),
    "stdlib": (".py",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "megatron": (".idx",),
    "raw": (".bin",),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class File:
    """A file of the corpus as it was listed."""

    origin: str
    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Corpus:
    """What a source is made of, sorted by origin, and what the listing had to pass over."""

    title: str
    root: str
    files: tuple[File, ...]
    skipped: Counter[Skip]


def list_corpus(source: SourceConfig, name: str, *, apart_from: Path) -> Corpus:
    """Lists the files of a source without reading them.

    Args:
        source: its path is set, unless it is the standard library.
        name: of the source, for messages.
        apart_from: a folder that is never entered: the cache may lie inside the folder that is read.

    Raises:
        DataError: the root is missing or cannot be listed, or no file matches.
    """
    include = source.include or tuple(f"*{end}{squeezed}" for end in ENDINGS[source.kind] for squeezed in _squeezed())
    if source.kind == "stdlib":
        # Inside a virtual environment this is still the base interpreter's library.
        root = Path(sysconfig.get_path("stdlib"))
        title = f"standard library of {platform.python_implementation()} {platform.python_version()}"
        missing = f"the standard library of this Python should be in {root}, which is missing: use a Python that has it"
    else:
        assert source.path  # by DataConfig.check
        root, title = Path(source.path).expanduser(), source.kind
        missing = f"the source {name}: {source.path} does not exist: give an existing file or folder"
    with os_errors_explained(root):
        if not root.exists():
            raise DataError(missing)
        root = root.resolve()
        if root.is_dir():
            files, skipped = _list_files(root, include, source.exclude, apart_from=apart_from.resolve())
        else:
            status = root.stat()
            files, skipped = (File(root.name, str(root), status.st_size, status.st_mtime_ns),), Counter()
    if not files:
        raise DataError(
            f"no file in {root} matches data.sources.{name}.include={list(include)} without matching exclude="
            f"{list(source.exclude)}{describe_skipped(skipped)}: change the patterns, or give another folder"
        )
    return Corpus(title, str(root), files, skipped)


def _squeezed() -> tuple[str, ...]:
    return ("", *COMPRESSED)


def describe_skipped(skipped: Counter[Skip]) -> str:
    """Counts and reasons as a clause to append to a sentence; empty if nothing was skipped."""
    parts = [f"{skipped[reason]} {reason.value}" for reason in Skip if skipped[reason]]
    return f" (skipped: {'; '.join(parts)})" if parts else ""


UNREADABLE = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP)


def _list_files(
    root: Path, include: Sequence[str], exclude: Sequence[str], *, apart_from: Path
) -> tuple[tuple[File, ...], Counter[Skip]]:
    files: list[File] = []
    skipped: Counter[Skip] = Counter()
    folders = [("", str(root))]
    while folders:
        prefix, folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            if not prefix or error.errno not in UNREADABLE:
                raise
            skipped[Skip.UNREADABLE] += 1
            continue
        for entry in entries:
            # A file name need not be text; an origin must be.
            origin = (prefix + entry.name).encode("utf-8", "backslashreplace").decode("utf-8")
            if entry.is_dir(follow_symlinks=False):
                # "name/*" matches "name/" too, so that an excluded folder is not entered at all.
                if not _matches(origin + "/", exclude) and entry.path != str(apart_from):
                    folders.append((origin + "/", entry.path))
                continue
            if _matches(origin, exclude) or not _matches(origin, include):
                continue
            found = _look_at(entry, origin)
            if isinstance(found, File):
                files.append(found)
            else:
                skipped[found] += 1
    return tuple(sorted(files, key=lambda file: file.origin)), skipped


def _look_at(entry: os.DirEntry[str], origin: str) -> File | Skip:
    try:
        status = entry.stat()  # of what a link points to
    except OSError as error:
        if error.errno in UNREADABLE:
            return Skip.UNREADABLE
        raise
    if stat.S_ISDIR(status.st_mode):
        return Skip.FOLDER_LINK
    if not stat.S_ISREG(status.st_mode):
        return Skip.NOT_A_FILE
    return File(origin, entry.path, status.st_size, status.st_mtime_ns)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
