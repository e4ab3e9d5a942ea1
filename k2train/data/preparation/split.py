"""The held-out split: whole groups of documents, chosen by a hash of the group's name.

Groups are visited in the order of the hash of their names, and each joins the held-out split if it still fits into its
share of the bytes. The share is thus kept closely whatever the sizes of the groups, where a threshold on the hash would
give anything from nothing to the largest group.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def group_sizes(hashes: NDArray[np.uint64], sizes: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The groups, by the hash of their names, and the bytes of each.

    Args:
        hashes: (D,) xxh3-64 of the name of each document's group.
        sizes: (D,) bytes of each document.

    Returns:
        (G,) hashes, rising, and (G,) bytes.
    """
    groups, inverse = np.unique(hashes, return_inverse=True)
    totals = np.zeros(len(groups), np.int64)
    np.add.at(totals, inverse, sizes)
    return groups, totals


def fill(totals: NDArray[np.int64], *, room: int) -> NDArray[np.bool_]:
    """Visits groups in their order and takes each that still fits.

    Args:
        totals: (G,) bytes of each group.
        room: bytes that those taken may have together.

    Returns:
        (G,) whether the group is taken.
    """
    taken = np.zeros(len(totals), bool)
    waiting = np.arange(len(totals))
    while (waiting := waiting[totals[waiting] <= room]).size:  # what no longer fits never will
        fitting = int(np.searchsorted(np.cumsum(totals[waiting]), room, side="right"))
        taken[waiting[:fitting]] = True
        room -= int(totals[waiting[:fitting]].sum())
        waiting = waiting[fitting:]
    return taken
