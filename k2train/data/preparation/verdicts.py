"""What becomes of each document: left out as a copy, held out, or trained on; and which shard it goes to.

It follows from the surveys of all lanes. Memory is bounded: sets that span the whole corpus (digests, groups) are
looked at in parts of a range of hashes each, and verdicts lie in a file that is mapped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from k2train.data.errors import DataError
from k2train.data.preparation.near import Seen
from k2train.data.preparation.split import fill, group_sizes
from k2train.data.preparation.survey import SKIPS, Lane, Survey
from k2train.data.sources import Skip, describe_skipped

TRAIN, HELD_OUT, SKIPPED = 0, 1, 2  # verdicts; from SKIPPED on the reason as in SKIPS
AT_ONCE = 1 << 24  # documents whose digests or groups are held in memory at a time


@dataclass(frozen=True)
class Plan:
    """Verdicts of all rows, lane after lane."""

    starts: tuple[int, ...]  # of each lane's rows; one more closes the last
    verdicts: NDArray[np.uint8]  # mapped
    skipped: dict[str, Counter[Skip]]  # by source
    text_bytes: int  # that are encoded

    def of(self, lane: Lane) -> NDArray[np.uint8]:
        """(R,) verdicts of a lane."""
        return self.verdicts[self.starts[lane.number] : self.starts[lane.number + 1]]


def decide(
    lanes: Sequence[Lane],
    read: Callable[[Lane], Survey],
    path: Path,
    *,
    sources: Iterable[str],
    dedup: str,
    near_threshold: float,
    share: float,
) -> Plan:
    """Decides on every row.

    Args:
        lanes: of all sources, in order.
        read: gives the survey of a lane.
        path: of the file of verdicts, which is made.
        sources: names of all of them.
        dedup: none, exact or near.
        near_threshold: the similarity from which documents are alike.
        share: of each source's bytes that is held out.

    Raises:
        DataError: a source has no text, or a single group.
    """
    starts = np.concatenate([[0], np.cumsum([len(read(lane).sizes) for lane in lanes])]).astype(np.int64)
    total = int(starts[-1])
    for source in sources:
        if not any(len(read(lane).sizes) for lane in lanes if lane.source == source):
            raise DataError(f"the source {source} has no documents: give it another path, or remove it")
    verdicts: NDArray[np.uint8] = np.memmap(path, np.uint8, "w+", shape=(total,))
    for lane in lanes:
        skips = read(lane).skips
        verdicts[starts[lane.number] : starts[lane.number + 1]] = np.where(skips == 0, TRAIN, SKIPPED + skips - 1)
    if dedup != "none":
        _mark_copies(lanes, read, starts, verdicts)
    if dedup == "near":
        _mark_near_copies(lanes, read, starts, verdicts, near_threshold)
    skipped: dict[str, Counter[Skip]] = {}
    text_bytes = 0
    for source in dict.fromkeys(lane.source for lane in lanes):
        own = [lane for lane in lanes if lane.source == source]
        counts = np.zeros(SKIPPED + len(SKIPS), np.int64)
        for lane in own:
            of_lane = verdicts[starts[lane.number] : starts[lane.number + 1]]
            counts += np.bincount(of_lane, minlength=len(counts))
        skipped[source] = Counter({SKIPS[i]: int(n) for i, n in enumerate(counts[SKIPPED:]) if n})
        if not counts[TRAIN]:
            raise DataError(
                f"the source {source} has no text{describe_skipped(skipped[source])}: give files with UTF-8 text, "
                f"or change the include and the filters of data.sources.{source}"
            )
        text_bytes += _hold_out(source, own, read, starts, verdicts, share)
    return Plan(tuple(starts.tolist()), verdicts, skipped, text_bytes)


def _parts(total: int) -> Iterator[tuple[int, int]]:
    """(shift, value): the parts of the hashes h with h >> shift == value, which together are all of them."""
    bits = max(0, (-(-total // AT_ONCE) - 1).bit_length())
    for value in range(1 << bits):
        yield 64 - bits, value


def _within(hashes: NDArray[np.uint64], shift: int, value: int) -> NDArray[np.bool_]:
    return np.ones(len(hashes), bool) if shift == 64 else (hashes >> np.uint64(shift)) == value


def _mark_copies(
    lanes: Sequence[Lane], read: Callable[[Lane], Survey], starts: NDArray[np.int64], verdicts: NDArray[np.uint8]
) -> None:
    for shift, value in _parts(int(starts[-1])):
        rows, digests = [], []
        for lane in lanes:
            found = read(lane)
            chosen = np.flatnonzero((found.skips == 0) & _within(found.digests[:, 0], shift, value))
            rows.append(starts[lane.number] + chosen)
            digests.append(found.digests[chosen])
        row, digest = np.concatenate(rows), np.concatenate(digests)
        order = np.lexsort((digest[:, 1], digest[:, 0]))  # stable: the first of equal ones stays first
        equal = (digest[order[1:]] == digest[order[:-1]]).all(axis=1)
        verdicts[row[order[1:][equal]]] = SKIPPED + SKIPS.index(Skip.COPY)


def _mark_near_copies(
    lanes: Sequence[Lane],
    read: Callable[[Lane], Survey],
    starts: NDArray[np.int64],
    verdicts: NDArray[np.uint8],
    threshold: float,
) -> None:
    seen = Seen(threshold)
    for lane in lanes:
        signatures, start = read(lane).signatures, int(starts[lane.number])
        for row in np.flatnonzero(verdicts[start : start + len(signatures)] == TRAIN).tolist():
            if not seen.add(signatures[row]):
                verdicts[start + row] = SKIPPED + SKIPS.index(Skip.NEAR_COPY)


def _hold_out(
    source: str,
    lanes: Sequence[Lane],
    read: Callable[[Lane], Survey],
    starts: NDArray[np.int64],
    verdicts: NDArray[np.uint8],
    share: float,
) -> int:
    """Marks the held-out rows of a source; returns the bytes of all its documents."""

    def documents(lane: Lane, shift: int, value: int) -> NDArray[np.int64]:
        kept = verdicts[starts[lane.number] : starts[lane.number + 1]] == TRAIN
        return np.flatnonzero(kept & _within(read(lane).groups, shift, value))

    total = sum(int(read(lane).sizes[documents(lane, 64, 0)].sum()) for lane in lanes)
    rows = int(starts[lanes[-1].number + 1] - starts[lanes[0].number])
    room, groups, smallest, chosen = int(share * total), 0, (total + 1, 0), []
    for shift, value in _parts(rows):
        found = [(read(lane), documents(lane, shift, value)) for lane in lanes]
        hashes, sizes = group_sizes(
            np.concatenate([survey.groups[at] for survey, at in found]),
            np.concatenate([survey.sizes[at] for survey, at in found]),
        )
        if len(hashes):
            taken = fill(sizes, room=room)
            chosen.append(hashes[taken])
            room -= int(sizes[taken].sum())
            groups += len(hashes)
            smallest = min(smallest, (int(sizes.min()), int(hashes[np.argmin(sizes)])), key=lambda pair: pair[0])
    if groups < 2:
        raise DataError(
            f"the source {source} needs at least two groups (directories, or files side by side), so that one can be "
            f"held out; it has {groups}: add files, widen its include, or set data.sources.{source}.group=document"
        )
    held_out = np.concatenate(chosen)
    if not held_out.size:  # every group is larger than the share
        held_out = np.array([smallest[1]], np.uint64)
    for lane in lanes:
        at = documents(lane, 64, 0)
        verdicts[starts[lane.number] + at[np.isin(read(lane).groups[at], held_out)]] = HELD_OUT
    return total
