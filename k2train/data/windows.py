"""The windows of one source: what a training sample may be.

Legend: T tokens of a window, G groups of shards, R rows.

*Concatenated*: the stream of tokens is cut into windows of T + 1 tokens with stride T, so that each token but the first
is a label in exactly one window; what is left over at the end is not used. *Packed*: ``k2train.data.packing``.

A window belongs to the group of shards in which its first label lies, and may reach into the next shard.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray

from k2train.data.dataset import IGNORED, Span, TokenStream
from k2train.data.packing import VERSION, Packing, pack
from k2train.data.shards import parse_header, view
from k2train.paths import atomic_write

Int64s = NDArray[np.int64]


class SourceWindows(Protocol):
    """Windows of a source, numbered through its groups."""

    sizes: list[int]  # (G,) windows of each group

    def read(self, window: int, row: Int64s) -> None:
        """Fills a row: (T + 1,) tokens of which all but the first are labels; of packed windows (2, T) of each."""

    def context_begins(self, window: int) -> Int64s:
        """At which of the window's tokens contexts begin, besides the first or with it, rising."""

    def documents(self, window: int) -> tuple[Int64s, Int64s]:
        """(P,) the number of the document that each piece of the labels is of, and (P,) how many labels it has."""

    def spans(self, window: int) -> list[Span]:
        """The documents, or pieces of them, that the window's labels come from."""


class Concatenated:
    """Windows cut from the stream, wherever documents end."""

    def __init__(self, stream: TokenStream, *, sequence_length: int, group_shards: int | None) -> None:
        """Opens no shard.

        Args:
            stream: of the source.
            sequence_length: T.
            group_shards: shards of a group; None: one group of all.
        """
        self._stream, self._length = stream, sequence_length
        windows = max(0, (len(stream) - 1) // sequence_length)
        firsts = [min(windows, -(-start // sequence_length)) for start in group_starts(stream, group_shards)]
        self.sizes: list[int] = np.diff([*firsts, windows]).tolist()

    def read(self, window: int, row: Int64s) -> None:
        """See ``SourceWindows``."""
        row[:] = self._stream.view(window * self._length, (window + 1) * self._length + 1)

    def context_begins(self, window: int) -> Int64s:
        """See ``SourceWindows``."""
        return self._stream.context_begins(window * self._length, (window + 1) * self._length)

    def documents(self, window: int) -> tuple[Int64s, Int64s]:
        """See ``SourceWindows``."""
        return self._stream.documents_in(window * self._length + 1, (window + 1) * self._length + 1)

    def spans(self, window: int) -> list[Span]:
        """See ``SourceWindows``; of the first token too, which is only read."""
        return self._stream.spans(window * self._length, (window + 1) * self._length + 1)


class Packed:
    """Windows of whole documents; see ``k2train.data.packing``."""

    def __init__(
        self,
        stream: TokenStream,
        packings: Sequence[Packing],
        *,
        sequence_length: int,
        group_shards: int | None,
        end_of_text: int,
    ) -> None:
        """Takes the packing of each group, as ``packings_of`` gives them."""
        self._stream, self._packings, self._end_of_text = stream, packings, end_of_text
        self._length = sequence_length
        self._offsets = group_starts(stream, group_shards)
        self.sizes = [len(packing) for packing in packings]
        self._firsts = np.cumsum([0, *self.sizes]).tolist()

    def read(self, window: int, row: Int64s) -> None:
        """See ``SourceWindows``. Before a document's first token comes the end_of_text of the one before it."""
        tokens, labels = row
        at = 0
        for start, length in self._pieces(window):
            stop = at + length
            if start:
                piece = self._stream.view(start - 1, start + length)
                tokens[at:stop], labels[at:stop] = piece[:-1], piece[1:]
            else:
                piece = self._stream.view(0, length)
                tokens[at], tokens[at + 1 : stop], labels[at:stop] = self._end_of_text, piece[:-1], piece
            at = stop
        if at < len(tokens):
            tokens[at:], labels[at:] = self._end_of_text, IGNORED

    def context_begins(self, window: int) -> Int64s:
        """See ``SourceWindows``; what is left unfilled is one of its own."""
        ends = self._window(window)[2].cumsum()
        return ends if ends[-1] < self._length else ends[:-1]

    def documents(self, window: int) -> tuple[Int64s, Int64s]:
        """See ``SourceWindows``."""
        found = [self._stream.documents_in(start, start + length) for start, length in self._pieces(window)]
        numbers, lengths = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return numbers, lengths

    def spans(self, window: int) -> list[Span]:
        """See ``SourceWindows``."""
        return [span for start, length in self._pieces(window) for span in self._stream.spans(start, start + length)]

    def _pieces(self, window: int) -> list[tuple[int, int]]:
        offset, starts, lengths = self._window(window)
        return list(zip((offset + starts).tolist(), lengths.tolist(), strict=True))

    def _window(self, window: int) -> tuple[int, Int64s, Int64s]:
        """Where the window's group begins in the stream, and starts in the group and lengths of its pieces."""
        group = bisect.bisect_right(self._firsts, window) - 1
        return self._offsets[group], *self._packings[group].window(window - self._firsts[group])


def group_starts(stream: TokenStream, group_shards: int | None) -> list[int]:
    """(G,) where each group of shards begins in the stream."""
    return stream.starts[: -1 : group_shards or max(1, len(stream.starts) - 1)]


def packings_of(
    stream: TokenStream, folder: Path, *, sequence_length: int, group_shards: int | None, fingerprint: str
) -> list[Packing]:
    """The packing of each group: read from beside the shards, or worked out and left there.

    A folder that cannot be written to costs the work again in the next run, and nothing else.

    Args:
        stream: of the source.
        folder: of the source's shards.
        sequence_length: T.
        group_shards: shards of a group; None: one group of all.
        fingerprint: of the data set.
    """
    path = folder / f"packed-{sequence_length}-{group_shards or 'all'}.safetensors"
    made_for = f"{VERSION}/{fingerprint}/{sequence_length}/{group_shards}"
    found = _read(path, made_for)
    if found is None:
        ends = stream.document_ends()
        edges = np.searchsorted(ends, [*group_starts(stream, group_shards)[1:], len(stream)], side="right")
        lengths = np.split(np.diff(ends, prepend=0), edges[:-1])
        found = [pack(part, sequence_length=sequence_length) for part in lengths]
        _write(path, made_for, found)
    return found


def _write(path: Path, made_for: str, packings: Sequence[Packing]) -> None:
    arrays = {
        "starts": np.concatenate([packing.starts for packing in packings]),
        "lengths": np.concatenate([packing.lengths for packing in packings]),
        "ends": np.concatenate([packing.ends for packing in packings]),
        "pieces": np.array([len(packing.starts) for packing in packings]),
        "windows": np.array([len(packing) for packing in packings]),
    }
    metadata = {"k2train": json.dumps({"made_for": made_for, "xxh3": _digest(arrays)})}
    try:
        atomic_write(path, safetensors.numpy.save(arrays, metadata))
    except OSError:
        return  # it can be worked out again


def _read(path: Path, made_for: str) -> list[Packing] | None:
    """None if the file is not there, damaged, or made for other data."""
    try:
        data = path.read_bytes()
        header, base = parse_header(data)
        arrays = {name: view(data, header, base, name) for name in ("starts", "lengths", "ends", "pieces", "windows")}
        said = json.loads(header["__metadata__"]["k2train"])
        if said != {"made_for": made_for, "xxh3": _digest(arrays)}:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    pieces, windows = np.cumsum(arrays["pieces"])[:-1], np.cumsum(arrays["windows"])[:-1]
    columns = (np.split(arrays[name], at) for name, at in (("starts", pieces), ("lengths", pieces), ("ends", windows)))
    return [Packing(*parts) for parts in zip(*columns, strict=True)]


def _digest(arrays: dict[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_64()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
