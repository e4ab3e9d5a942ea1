"""Shards: safetensors files of token ids with their documents; docs/data-format.md describes them.

Legend: N tokens of a shard, D documents of it.

A shard is written whole (aside, synced, renamed) and read through a memory map. It names the work unit that it holds
and the hash of its own tensors, so that a later ``prepare`` can tell a finished shard from a damaged one; the manifest
has the hash of the whole file, which ``open_shard`` checks.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray

from k2train.data.errors import DataError, os_errors_explained
from k2train.paths import atomic_write

DTYPES: dict[str, np.dtype[Any]] = {
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
TENSORS = ("tokens", "document_ends", "document_bytes", "origins", "origin_ends")


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of a shard."""

    file: str
    size: int  # bytes of the file
    xxh3: str  # of the whole file
    tokens: int
    documents: int
    text_bytes: int  # of the documents, in UTF-8


@dataclass(frozen=True)
class Shard:
    """An open shard; the arrays are views of the mapped file."""

    tokens: NDArray[Any]  # (N,) uint16 or uint32: documents back to back, each closed by end_of_text
    document_ends: NDArray[np.int64]  # (D,) where each document ends in tokens, its end_of_text included
    document_bytes: NDArray[np.int64]  # (D,) UTF-8 bytes of each document's text
    origins: NDArray[np.uint8]  # the origins' UTF-8 bytes back to back
    origin_ends: NDArray[np.int64]  # (D,) where each origin ends in origins

    def origin(self, document: int) -> str:
        """Where document number ``document`` of this shard came from."""
        start = int(self.origin_ends[document - 1]) if document else 0
        return self.origins[start : int(self.origin_ends[document])].tobytes().decode("utf-8")


def write_shard(
    path: Path,
    documents: Sequence[NDArray[np.uint32]],
    *,
    document_bytes: Sequence[int],
    origins: Sequence[str],
    vocab_size: int,
    unit: str,
) -> ShardRecord:
    """Writes a shard, whole or not at all.

    Args:
        path: of the file to make.
        documents: token ids of each document, end_of_text included.
        document_bytes: UTF-8 bytes of each document's text.
        origins: where each document came from.
        vocab_size: ids lie below it; up to 65536 of them take two bytes a token, more take four.
        unit: names the work unit, so that ``find_shard`` recognises it.

    Raises:
        OSError: as it came from the file system.
    """
    names = [origin.encode() for origin in origins]
    arrays = {
        "tokens": np.concatenate(documents).astype("<u2" if vocab_size <= 1 << 16 else "<u4"),
        "document_ends": np.cumsum([len(document) for document in documents], dtype="<i8"),
        "document_bytes": np.array(document_bytes, dtype="<i8"),
        "origins": np.frombuffer(b"".join(names), dtype="u1"),
        "origin_ends": np.cumsum([len(name) for name in names], dtype="<i8"),
    }
    # One metadata entry: safetensors does not keep the order of several, and equal data must give equal files.
    metadata = {"k2train": json.dumps({"unit": unit, "xxh3": _digest_of(arrays)})}
    data = safetensors.numpy.save(arrays, metadata)
    atomic_write(path, data)
    return _record(path, data, Shard(**arrays))


def find_shard(path: Path, *, unit: str) -> ShardRecord | None:
    """The record of a shard that an interrupted run has finished; None if it is missing, damaged or of another unit.

    Raises:
        OSError: as it came from the file system.
    """
    if not path.is_file():
        return None
    data = path.read_bytes()
    try:
        arrays, metadata = _parse(data)
        said = json.loads(metadata["k2train"])
        if said == {"unit": unit, "xxh3": _digest_of(arrays)}:
            return _record(path, data, Shard(**arrays))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # cut short or flipped: it is written again
    return None


def open_shard(folder: Path, record: ShardRecord) -> Shard:
    """Maps a shard and checks that its bytes are the ones the manifest was made for.

    Raises:
        DataError: missing, of another size, or of another hash.
    """
    path = folder / record.file
    remedy = f"delete the folder {folder} and prepare the data again"
    with os_errors_explained(path):
        if not path.is_file():
            raise DataError(f"the shard {path} is missing: {remedy}")
        size = path.stat().st_size
        if size != record.size:
            raise DataError(f"the shard {path} has {size} bytes and its manifest says {record.size}: {remedy}")
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    digest = xxhash.xxh3_64_hexdigest(data)
    if digest != record.xxh3:
        raise DataError(
            f"the shard {path} is damaged: its xxh3 is {digest} and its manifest says {record.xxh3}: {remedy}"
        )
    arrays, _ = _parse(data)
    return Shard(**arrays)


def _record(path: Path, data: bytes, shard: Shard) -> ShardRecord:
    return ShardRecord(
        file=path.name,
        size=len(data),
        xxh3=xxhash.xxh3_64_hexdigest(data),
        tokens=len(shard.tokens),
        documents=len(shard.document_ends),
        text_bytes=int(shard.document_bytes.sum()),
    )


def _digest_of(arrays: dict[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_64()
    for name in TENSORS:
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _parse(data: bytes | mmap.mmap) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors, as views of ``data``, and metadata of a safetensors file; ValueError or KeyError if it is none."""
    if len(data) < 8:
        raise ValueError("shorter than its header")
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata: dict[str, str] = header.pop("__metadata__", {})
    arrays: dict[str, NDArray[Any]] = {}
    for name in TENSORS:
        dtype: np.dtype[Any] = DTYPES[header[name]["dtype"]]
        start, stop = header[name]["data_offsets"]
        arrays[name] = np.frombuffer(data, dtype, (stop - start) // dtype.itemsize, 8 + length + start)
    return arrays, metadata
