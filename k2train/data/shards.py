"""Shards: safetensors files of token ids with their documents; docs/data-format.md describes them.

Legend: N tokens of a shard, D documents of it.

A shard is written whole (aside, synced, renamed) and read through a memory map. It names the work unit that it holds
and the hash of its own tensors, so that a later ``prepare`` can tell a finished shard from a damaged one; the manifest
has the hash of the whole file, and digests of its blocks lie beside it, which ``open_shard`` checks.
"""

from __future__ import annotations

import hashlib
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
from k2train.data.manifest import BLOCK_BYTES, ShardRecord, block_digests, map_file
from k2train.paths import atomic_write

DTYPES: dict[str, np.dtype[Any]] = {
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
TENSORS = ("tokens", "document_ends", "document_ids", "document_bytes", "origins", "origin_ends")


@dataclass(frozen=True)
class Shard:
    """An open shard; the arrays are views of the mapped file."""

    tokens: NDArray[Any]  # (N,) uint16 or uint32: documents back to back, each closed by end_of_text
    document_ends: NDArray[np.int64]  # (D,) where each document ends in tokens, its end_of_text included
    document_ids: NDArray[np.int64]  # (D,) the number of each document in its source, rising
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
    document_ids: Sequence[int],
    document_bytes: Sequence[int],
    origins: Sequence[str],
    vocab_size: int,
    unit: str,
) -> None:
    """Writes a shard, whole or not at all.

    Args:
        path: of the file to make.
        documents: token ids of each document, end_of_text included.
        document_ids: the number of each document in its source.
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
        "document_ids": np.array(document_ids, dtype="<i8"),
        "document_bytes": np.array(document_bytes, dtype="<i8"),
        "origins": np.frombuffer(b"".join(names), dtype="u1"),
        "origin_ends": np.cumsum([len(name) for name in names], dtype="<i8"),
    }
    # One metadata entry: safetensors does not keep the order of several, and equal data must give equal files.
    metadata = {"k2train": json.dumps({"unit": unit, "xxh3": _digest_of(arrays)})}
    atomic_write(path, safetensors.numpy.save(arrays, metadata))


def find_shard(folder: Path, name: str, *, unit: str) -> tuple[ShardRecord, NDArray[np.uint64]] | None:
    """Record and block digests of a finished shard; None if it is missing, damaged or of another unit.

    Args:
        folder: of the data set.
        name: of the shard's file, relative to the folder.
        unit: the work unit that the shard must hold.

    Raises:
        OSError: as it came from the file system.
    """
    path = folder / name
    if not path.is_file():
        return None
    data = map_file(path)
    try:
        arrays, metadata = _parse(data)
        said = json.loads(metadata["k2train"])
        if said == {"unit": unit, "xxh3": _digest_of(arrays)}:
            record = ShardRecord(
                file=name,
                size=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                tokens=len(arrays["tokens"]),
                documents=len(arrays["document_ends"]),
                text_bytes=int(arrays["document_bytes"].sum()),
            )
            return record, block_digests(data)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # cut short or flipped: it is written again
    return None


def open_shard(folder: Path, record: ShardRecord, digests: NDArray[np.uint64]) -> Shard:
    """Maps a shard and checks that its bytes are the ones the manifest was made for.

    Args:
        folder: of the data set.
        record: what the manifest says of the shard.
        digests: of its blocks, as ``open_digests`` has them.

    Raises:
        DataError: missing, of another size, or with a block of another digest.
    """
    path = folder / record.file
    remedy = f"delete the folder {folder} and prepare the data again"
    with os_errors_explained(path):
        if not path.is_file():
            raise DataError(f"the shard {path} is missing: {remedy}")
        size = path.stat().st_size
        if size != record.size:
            raise DataError(f"the shard {path} has {size} bytes and its manifest says {record.size}: {remedy}")
        data = map_file(path)
    found = block_digests(data)
    if (wrong := np.flatnonzero(found != digests)).size:
        block = int(wrong[0])
        raise DataError(
            f"the shard {path} is damaged in bytes {block * BLOCK_BYTES} to "
            f"{min(size, (block + 1) * BLOCK_BYTES)}: their xxh3 is {found[block]:016x} and was "
            f"{digests[block]:016x} when it was written: {remedy}"
        )
    arrays, _ = _parse(data)
    return Shard(**arrays)


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
