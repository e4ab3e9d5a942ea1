"""Best-fit packing: windows of whole documents, where only a document longer than a window is cut.

A document of n tokens, its end_of_text included, is n labels. One longer than T gives floor(n / T) full windows and a
rest. Documents and rests are packed by best-fit decreasing: the longest first, each into the fullest window that has
room for it. Windows that stay unfilled are filled up with labels that the loss leaves out.

Documents of one length are interchangeable, so that they are placed together: a window with room r takes floor(r / n)
of them one after another, as what is left of the window is then the best fit for the next. The work grows with the
number of different lengths and rooms, not with documents times log(windows).

Sources: Johnson 1973 (best-fit decreasing); Ding et al. 2024, "Fewer truncations improve language modeling" (arXiv
2404.10830, packing for language models).

Legend: D documents, P pieces, W windows, T tokens of a window.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

VERSION = 1  # of the result: files made by another one are made anew


@dataclass(frozen=True)
class Packing:
    """Windows made of pieces: window w has the pieces ``ends[w - 1]`` to ``ends[w]``."""

    starts: NDArray[np.int64]  # (P,) position of each piece's first label in the stream of tokens
    lengths: NDArray[np.int64]  # (P,) its labels
    ends: NDArray[np.int64]  # (W,) how many pieces there are up to and with each window

    def __len__(self) -> int:
        return len(self.ends)

    def window(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Starts and lengths of a window's pieces."""
        first = int(self.ends[number - 1]) if number else 0
        last = int(self.ends[number])
        return self.starts[first:last], self.lengths[first:last]


def pack(document_lengths: NDArray[np.int64], *, sequence_length: int) -> Packing:
    """Packs documents that lie back to back in a stream.

    Args:
        document_lengths: (D,) tokens of each, its end_of_text included.
        sequence_length: T, labels of a window.

    Returns:
        Each token of the stream in exactly one piece. No document of T tokens or fewer is cut.
    """
    lengths = np.asarray(document_lengths, dtype=np.int64)
    begins = np.cumsum(lengths) - lengths
    full = lengths // sequence_length
    rests = lengths - full * sequence_length
    # The full windows of long documents, in order.
    owner = np.repeat(np.arange(len(lengths)), full)
    turn = np.arange(len(owner)) - np.repeat(np.cumsum(full) - full, full)
    full_starts = begins[owner] + turn * sequence_length

    broken = np.flatnonzero(rests)
    by_length = broken[np.argsort(-rests[broken], kind="stable")]
    windows, count = _best_fit_decreasing(rests[by_length], sequence_length)
    # Windows side by side, and in each the pieces in the order of the stream.
    starts = (begins + full * sequence_length)[by_length]
    order = np.lexsort((starts, windows))
    ends = np.cumsum(np.bincount(windows, minlength=count))
    return Packing(
        starts=np.concatenate([full_starts, starts[order]]),
        lengths=np.concatenate([np.full(len(full_starts), sequence_length), rests[by_length][order]]),
        ends=np.concatenate([np.arange(1, len(full_starts) + 1), len(full_starts) + ends]),
    )


def _best_fit_decreasing(lengths: NDArray[np.int64], room: int) -> tuple[NDArray[np.int64], int]:
    """The window of each piece, and how many windows there are.

    Args:
        lengths: (P,) never rising, from 1 to ``room``.
        room: of an empty window.
    """
    windows = np.empty(len(lengths), dtype=np.int64)
    opened = 0
    by_room: dict[int, list[int]] = {}  # windows that are neither full nor empty, by the room they have
    rooms: list[int] = []  # the keys of by_room, rising

    def keep(left: int, numbers: list[int]) -> None:
        if not left or not numbers:
            return
        if left not in by_room:
            bisect.insort(rooms, left)
            by_room[left] = []
        by_room[left] += numbers

    edges = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
    for first, last in pairwise(edges):
        place, length = first, int(lengths[first]) if last > first else 0
        while place < last:
            at = bisect.bisect_left(rooms, length)
            best = rooms[at] if at < len(rooms) else room
            fit = best // length
            wanted = -(-(last - place) // fit)
            if at < len(rooms):
                numbers = by_room[best][:wanted]
                by_room[best] = by_room[best][wanted:]
                if not by_room[best]:
                    del by_room[best], rooms[at]
            else:
                numbers = list(range(opened, opened + wanted))
                opened += wanted
            placed = min(last - place, fit * len(numbers))
            windows[place : place + placed] = np.repeat(numbers, fit)[:placed]
            place += placed
            partly = placed - fit * (len(numbers) - 1)  # pieces in the last window
            keep(best - fit * length, numbers[:-1] if partly < fit else numbers)
            if partly < fit:
                keep(best - partly * length, numbers[-1:])
    return windows, opened
