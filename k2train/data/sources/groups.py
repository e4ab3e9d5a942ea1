"""Groups of files: what is held out as a whole.

Files of one directory often resemble each other, so a directory is a group. Files that lie directly in the folder that
all files have in common are not held together by it: each is a group of its own, named by its stem (``decimal.py`` and
``decimal.pyi`` stay together).
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence


def groups_of(origins: Sequence[str]) -> list[str]:
    """The group of each origin: its directory, or its stem if it lies in the folder common to all of them."""
    parents = [posixpath.dirname(origin) for origin in origins]
    common = posixpath.commonpath(parents) if parents else ""
    return [
        posixpath.join(parent, posixpath.basename(origin).split(".")[0]) if parent == common else parent + "/"
        for origin, parent in zip(origins, parents, strict=True)
    ]
