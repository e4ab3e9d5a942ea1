"""Shards: safetensors files of token ids with their documents; docs/data-format.md describes them.

Legend: N tokens of a shard, D documents of it.

A shard is written whole (aside, synced, renamed) and read through a memory map. It names the work unit that it holds
and the hash of its own tensors, so that a later ``prepare`` can tell a finished shard from a damaged one; the manifest
has the hash of the whole file, and digests of its blocks lie beside it, which ``k2train.data.reader`` checks.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray

from k2train.data.manifest import ShardRecord, block_digests, map_file
from k2train.paths import atomic_write

DTYPES: dict[str, np.dtype[Any]] = {
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
TENSORS = (
    "tokens",  # (N,) uint16 or uint32: documents back to back, each closed by end_of_text
    "document_ends",  # (D,) where each document ends in tokens, its end_of_text included
    "document_ids",  # (D,) the number of each document in its source, rising
    "document_bytes",  # (D,) UTF-8 bytes of each document's text
    "origins",  # the origins' UTF-8 bytes back to back
    "origin_ends",  # (D,) where each origin ends in origins
)


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


def _digest_of(arrays: dict[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_64()
    for name in TENSORS:
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _parse(data: bytes | mmap.mmap) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors, as views of ``data``, and metadata of a safetensors file; ValueError or KeyError if it is none."""
    header, base = parse_header(data)
    metadata: dict[str, str] = header.get("__metadata__", {})
    return {name: view(data, header, base, name) for name in TENSORS}, metadata


def parse_header(data: bytes | mmap.mmap | memoryview) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its tensors begin; ValueError if it is none."""
    if len(data) < 8:
        raise ValueError("shorter than its header")
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(bytes(data[8 : 8 + length]))
    return header, 8 + length


def view(data: bytes | mmap.mmap | memoryview, header: dict[str, Any], base: int, name: str) -> NDArray[Any]:
    """A tensor as a view of the file's bytes."""
    dtype: np.dtype[Any] = DTYPES[header[name]["dtype"]]
    start, stop = header[name]["data_offsets"]
    return np.frombuffer(data, dtype, (stop - start) // dtype.itemsize, base + start)
