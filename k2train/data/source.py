"""Where text comes from: the files of the running interpreter's standard library, or of a folder.

A corpus is a listing, sorted by origin (the path relative to its root, with forward slashes): the same files give the
same corpus on any machine. Reading is apart from listing, so that a listing alone tells whether anything has changed.

A file is a document. Patterns are those of ``fnmatch`` on the origin, where ``*`` also matches slashes: a file belongs
to the corpus if one of ``include`` matches it and none of ``exclude`` does. What belongs to it and cannot be used is
counted under its reason and never stops the rest; see ``Skip``.
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

from k2train.config import DataConfig
from k2train.data.errors import DataError, os_errors_explained


class Skip(Enum):
    """Why a file that the patterns ask for is no document."""

    UNREADABLE = "no permission, a broken link, or gone since it was listed"
    NOT_A_FILE = "a pipe, socket or device"
    FOLDER_LINK = "a link to a folder, which could lead in circles"
    EMPTY = "empty"
    BINARY = "binary: it has a NUL byte"
    NOT_UTF8 = "not UTF-8"
    COPY = "byte for byte a copy of an earlier file"


@dataclass(frozen=True)
class File:
    """A file of the corpus as it was listed."""

    origin: str
    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Corpus:
    """The files to read, sorted by origin, and what the listing had to pass over."""

    name: str
    root: Path
    files: tuple[File, ...]
    skipped: Counter[Skip]


def find_corpus(config: DataConfig, name: str, *, apart_from: Path) -> Corpus:
    """Lists the files of a source without reading them.

    Args:
        config: of the data set.
        name: of the source.
        apart_from: a folder that is never entered: the cache may lie inside the folder that is read.

    Raises:
        DataError: the root is missing, is no folder or cannot be listed, or no file matches.
    """
    source = config.sources[name]
    include = ("*",) if source.include is None else source.include
    if source.kind == "stdlib":
        # Inside a virtual environment this is still the base interpreter's library.
        root = Path(sysconfig.get_path("stdlib"))
        title = f"standard library of {platform.python_implementation()} {platform.python_version()}"
        missing = f"the standard library of this Python should be in {root}, which is missing: use a Python that has it"
    else:
        path = source.path or config.path
        assert path  # by DataConfig.check
        root, title = Path(path).expanduser(), "folder"
        missing = f"the source {name}: {path} does not exist: give an existing folder"
    with os_errors_explained(root):
        if not root.exists():
            raise DataError(missing)
        if not root.is_dir():
            raise DataError(f"the source {name}: {root} is not a folder: give a folder; include picks files in it")
        root = root.resolve()
        files, skipped = _list_files(root, include, source.exclude, apart_from=apart_from.resolve())
    if not files:
        raise DataError(
            f"no file in {root} matches data.sources.{name}.include={list(include)} without matching exclude="
            f"{list(source.exclude)}{describe_skipped(skipped)}: change the patterns, or give another folder"
        )
    return Corpus(title, root, files, skipped)


def read_text(file: File) -> str | Skip:
    """The file's text, exactly (line ends and a byte order mark stay), or why it is no document.

    Files that are not UTF-8 are left out, not repaired: replacement characters would be trained on, and the bytes of a
    document would no longer be those of the file.
    """
    try:
        data = Path(file.path).read_bytes()
    except OSError as error:
        if error.errno in _UNREADABLE:
            return Skip.UNREADABLE
        raise
    if not data:
        return Skip.EMPTY
    if b"\0" in data:
        return Skip.BINARY
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return Skip.NOT_UTF8


def describe_skipped(skipped: Counter[Skip]) -> str:
    """Counts and reasons as a clause to append to a sentence; empty if nothing was skipped."""
    parts = [f"{skipped[reason]} {reason.value}" for reason in Skip if skipped[reason]]
    return f" (skipped: {'; '.join(parts)})" if parts else ""


_UNREADABLE = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP)


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
            if not prefix or error.errno not in _UNREADABLE:
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
        if error.errno in _UNREADABLE:
            return Skip.UNREADABLE
        raise
    if stat.S_ISDIR(status.st_mode):
        return Skip.FOLDER_LINK
    if not stat.S_ISREG(status.st_mode):
        return Skip.NOT_A_FILE
    return File(origin, entry.path, status.st_size, status.st_mtime_ns)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
