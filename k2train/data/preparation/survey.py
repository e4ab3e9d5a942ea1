"""The first pass over the text: of each document its size, a digest, and a hash of its group.

A *lane* is what one process reads in order: neighbouring pieces of a source, about as much as one shard holds. Lanes
follow from the source alone, so that the work is cut in the same way whoever does it. A lane's survey is a file; one
that an interrupted run has left whole is not made again.

Legend: R rows of a lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError

from k2train.config import SourceConfig
from k2train.data.preparation import near
from k2train.data.sources import Piece, Row, Skip, read_rows
from k2train.paths import atomic_write

Tick = Callable[[int], None]  # told the bytes that were read

SKIPS = tuple(Skip)  # a row's skip is 0 for a document, else 1 + the place of its reason here


@dataclass(frozen=True)
class Lane:
    """Pieces of a source that one process reads in order."""

    source: str
    number: int  # in the data set
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes that are read, about."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class Survey:
    """What the first pass has learnt of a lane."""

    sizes: NDArray[np.int64]  # (R,) bytes of UTF-8, or of ids
    digests: NDArray[np.uint64]  # (R, 2) xxh3-128 of the content
    groups: NDArray[np.uint64]  # (R,) xxh3-64 of the group's name
    skips: NDArray[np.uint8]  # (R,)
    signatures: NDArray[np.uint32]  # (R, P) of MinHash; P = 0 where no near copies are looked for


def lanes_of(pieces: Mapping[str, Iterable[Piece]], *, size: int) -> Iterator[Lane]:
    """Cuts each source's pieces into lanes of about ``size`` bytes; a larger piece is a lane of its own."""
    number = 0
    for source, found in pieces.items():
        held: list[Piece] = []
        total = 0
        for piece in found:
            if held and total + piece.size > size:
                yield Lane(source, number, tuple(held))
                held, total, number = [], 0, number + 1
            held.append(piece)
            total += piece.size
        if held:
            yield Lane(source, number, tuple(held))
            number += 1


def rows_of(source: SourceConfig, lane: Lane, tick: Tick) -> Iterator[Row]:
    """The rows of a lane, in order."""
    for piece in lane.pieces:
        yield from read_rows(source, piece)
        tick(piece.size)


def digest_of(content: str | NDArray[np.uint32]) -> tuple[int, int, int]:
    """(bytes, and the halves of xxh3-128) of a document."""
    data = content.encode("utf-8") if isinstance(content, str) else content.tobytes()
    digest = xxhash.xxh3_128_intdigest(data)
    return len(data), digest >> 64, digest & (2**64 - 1)


def survey(path: Path, source: SourceConfig, lane: Lane, *, signatures: bool, tick: Tick) -> None:
    """Reads a lane and writes its survey to ``path``, unless it is there."""
    if path.is_file() and read_survey(path) is not None:
        tick(lane.size)
        return
    numbers: list[tuple[int, int, int, int, int]] = []
    minhashes: list[NDArray[np.uint32]] = []
    for row in rows_of(source, lane, tick):
        group = xxhash.xxh3_64_intdigest(row.group.encode("utf-8", "surrogatepass"))
        if isinstance(row.content, Skip):
            numbers.append((0, 0, 0, group, 1 + SKIPS.index(row.content)))
        else:
            numbers.append((*digest_of(row.content), group, 0))
        if signatures:
            minhashes.append(near.signature(row.content if isinstance(row.content, str) else ""))
    columns = np.array(numbers, dtype=np.uint64).reshape(len(numbers), 5)
    arrays = {
        "sizes": columns[:, 0].astype(np.int64),
        "digests": np.ascontiguousarray(columns[:, 1:3]),
        "groups": columns[:, 3].copy(),
        "skips": columns[:, 4].astype(np.uint8),
        "signatures": np.array(minhashes, np.uint32).reshape(len(numbers), -1 if minhashes else 0),
    }
    atomic_write(path, safetensors.numpy.save(arrays, {"xxh3": _digest(arrays)}))


def read_survey(path: Path) -> Survey | None:
    """A survey that is whole, else None.

    Raises:
        OSError: as it came from the file system.
    """
    data = path.read_bytes()
    try:
        arrays = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        whole = f'"xxh3":"{_digest(arrays)}"'.encode() in data[8 : 8 + length]
        return Survey(**arrays) if whole else None
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None


def _digest(arrays: dict[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_64()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
