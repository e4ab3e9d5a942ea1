"""What others have tokenized: Megatron's ``.bin`` with ``.idx``, and raw files of uint16 or uint32.

Megatron-LM's index (megatron/core/datasets/indexed_dataset.py): 9 bytes of magic, version u64, type u8, number of
sequences u64, number of document bounds u64, then for each sequence its length (i32) and its offset in the data (i64),
and the document bounds (i64), which count sequences. Raw files have ids and nothing else, as nanoGPT writes them, or a
header of 256 int32 before them, as llm.c does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2train.config import SourceConfig
from k2train.data.errors import DataError
from k2train.data.sources.listing import File, Skip
from k2train.data.sources.rows import Piece, Row

MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LLM_C_MAGIC, LLM_C_HEADER = 20240520, 1024  # bytes
STRIDE = 1 << 20  # ids that are searched for a separator at a time


def cut_megatron(file: File, group: str, size: int) -> Iterator[Piece]:
    """Pieces of whole documents, of about ``size`` bytes of the data."""
    _, _, lengths, bounds, dtype = _index(file.path)
    width, documents = np.dtype(dtype).itemsize, len(bounds) - 1
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[bounds] * width
    start = 0
    while start < documents:
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] + size, side="right")) - 1)
        yield Piece(file.origin, file.path, start, stop, int(ends[stop] - ends[start]), group)
        start = stop


def read_megatron(source: SourceConfig, piece: Piece) -> Iterator[Row]:
    """The documents of a piece; a document's place is its number in the file, from 0 on."""
    data, offsets, lengths, bounds, dtype = _index(piece.path)
    for document in range(piece.start, piece.stop):
        parts = [
            np.frombuffer(data, dtype, lengths[number], offsets[number])
            for number in range(bounds[document], bounds[document + 1])
        ]
        ids = np.concatenate(parts) if parts else np.empty(0, dtype)
        if len(ids) and ids[-1] == source.separator:
            ids = ids[:-1]
        yield _row(ids, f"{piece.origin}#{document}")


def _index(path: str) -> tuple[Any, NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], str]:
    """(bytes of the data, offsets, lengths, document bounds, type of the ids)."""
    index = np.memmap(path, np.uint8, "r")
    kind = int(index[17]) if len(index) > 34 else 0
    if index[:9].tobytes() != MAGIC or kind not in MEGATRON_TYPES:
        raise DataError(f"{path} is no Megatron index of version 1: give the folder or .idx of an indexed data set")
    sequences, documents = (int(number) for number in np.frombuffer(index, "<u8", 2, 18))
    if len(index) < 34 + 12 * sequences + 8 * documents:
        raise DataError(f"{path} is cut short: it has {len(index)} bytes for {sequences} sequences; copy it again")
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    offsets = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    bounds = np.frombuffer(index, "<i8", documents, 34 + 12 * sequences)
    binary = Path(path).with_suffix(".bin")
    if not binary.is_file():
        raise DataError(f"{binary} is missing beside its index {path}: put it there")
    dtype = MEGATRON_TYPES[kind]
    needed = int(offsets[-1]) + int(lengths[-1]) * np.dtype(dtype).itemsize if sequences else 0
    if binary.stat().st_size < needed:
        raise DataError(f"{binary} is cut short: it has {binary.stat().st_size} bytes and its index asks for {needed}")
    return np.memmap(binary, np.uint8, "r") if needed else b"", offsets, lengths, bounds, dtype


def cut_raw(file: File, group: str, size: int, dtype: str) -> Iterator[Piece]:
    """Pieces of about ``size`` bytes."""
    ids = _raw(file.path, dtype)
    step = max(1, size // ids.itemsize)
    for start in range(0, len(ids), step):
        stop = min(start + step, len(ids))
        yield Piece(file.origin, file.path, start, stop, (stop - start) * ids.itemsize, group)


def read_raw(source: SourceConfig, piece: Piece) -> Iterator[Row]:
    """The documents that begin in a piece; a document's place is the number of its first token in the file."""
    ids = _raw(piece.path, source.dtype)
    start = piece.start
    if start:  # what began before belongs to the piece before
        start = _next_separator(ids, start - 1, source.separator) + 1
    while start < piece.stop:
        stop = _next_separator(ids, start, source.separator)
        if stop > start:  # separators may lie on either side, or both
            yield _row(np.asarray(ids[start:stop]), f"{piece.origin}#{start}")
        start = stop + 1


def _raw(path: str, dtype: str) -> NDArray[Any]:
    size = Path(path).stat().st_size
    head = np.fromfile(path, "<i4", 1)
    skipped = LLM_C_HEADER if size >= LLM_C_HEADER and head.size and head[0] == LLM_C_MAGIC else 0
    if (size - skipped) % np.dtype(dtype).itemsize or size == skipped:
        raise DataError(
            f"{path} has {size} bytes, no whole number of {dtype} ids: set the source's dtype, or copy it again"
        )
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r", skipped)


def _next_separator(ids: NDArray[Any], start: int, separator: int | None) -> int:
    """Where the next separator is; the end if there is none."""
    while start < len(ids):
        found = np.flatnonzero(ids[start : start + STRIDE] == separator)
        if found.size:
            return start + int(found[0])
        start += STRIDE
    return len(ids)


def _row(ids: NDArray[Any], place: str) -> Row:
    return Row(ids.astype(np.uint32) if len(ids) else Skip.EMPTY, place, place)
