"""The held-out split: whole groups of documents, chosen by a hash of the group's name.

Files of one directory often resemble each other, so a directory goes to one side as a whole. Files that lie directly
in the folder that all files have in common are not held together by it: each is a group of its own, named by its stem
(``decimal.py`` and ``decimal.pyi`` stay together).

Groups are visited in the order of the hash of their names, and each joins the held-out split if it still fits into its
share of the bytes. The share is thus kept closely whatever the sizes of the directories, where a threshold on the hash
would give anything from nothing to the largest directory.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence

import xxhash

from k2train.data.errors import DataError


def groups_of(origins: Sequence[str]) -> list[str]:
    """The group of each origin: its directory, or its stem if it lies in the folder common to all of them."""
    parents = [posixpath.dirname(origin) for origin in origins]
    common = posixpath.commonpath(parents) if parents else ""
    return [
        posixpath.join(parent, posixpath.basename(origin).split(".")[0]) if parent == common else parent + "/"
        for origin, parent in zip(origins, parents, strict=True)
    ]


def held_out_groups(bytes_by_group: Mapping[str, int], *, share: float) -> frozenset[str]:
    """Picks the groups that are held out.

    Args:
        bytes_by_group: the size of each group's text.
        share: of the bytes, above 0 and below 1.

    Returns:
        At least one group and not all of them. If every group is larger than the share, the smallest alone.

    Raises:
        DataError: fewer than two groups.
    """
    assert 0 < share < 1, share
    if len(bytes_by_group) < 2:
        raise DataError(
            f"a corpus needs at least two directories, or two files side by side, so that one can be held out; "
            f"this one has {len(bytes_by_group)}: add files, or widen the source's include"
        )
    by_hash = sorted(bytes_by_group, key=lambda name: (xxhash.xxh3_64_intdigest(name.encode()), name))
    left = int(share * sum(bytes_by_group.values()))
    chosen = set()
    for name in by_hash:
        if bytes_by_group[name] <= left:
            chosen.add(name)
            left -= bytes_by_group[name]
    assert len(chosen) < len(bytes_by_group)
    return frozenset(chosen or {min(by_hash, key=lambda name: bytes_by_group[name])})
