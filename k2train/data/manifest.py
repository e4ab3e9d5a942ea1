"""The manifest: what a prepared data set is, and the hashes that everything in it is checked against.

It is read whole by every process of a run, so it stays small: a few numbers a shard. The digests of the shards' blocks
lie in one file a source beside the shards, which is mapped and read where a block is. docs/data-format.md describes
both.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray

from k2train.data.errors import DataError, os_errors_explained
from k2train.paths import atomic_write

FORMAT = "k2train-data"
VERSION = 2
SPLITS = ("train", "held_out")
MANIFEST_NAME = "manifest.json"
DIGESTS_NAME = "blocks.safetensors"
BLOCK_BYTES = 1 << 20  # of a shard's file that one digest covers: what is read and hashed before a first token is


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of a shard."""

    file: str  # relative to the data set's folder
    size: int  # bytes of the file
    sha256: str  # of the file
    tokens: int
    documents: int
    text_bytes: int  # of the documents, in UTF-8

    @property
    def blocks(self) -> int:
        """Blocks of ``BLOCK_BYTES`` in the file, the last of which may be shorter."""
        return -(-self.size // BLOCK_BYTES)


def block_digests(data: bytes | mmap.mmap) -> NDArray[np.uint64]:
    """xxh3-64 of each block of a shard's file."""
    view = memoryview(data)
    starts = range(0, len(view), BLOCK_BYTES)
    return np.array([xxhash.xxh3_64_intdigest(view[start : start + BLOCK_BYTES]) for start in starts], dtype=np.uint64)


def describe_file(folder: Path, name: str) -> dict[str, Any]:
    """Name, size and sha256 of a file that belongs to the data set."""
    data = (folder / name).read_bytes()
    return {"file": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def describe_split(records: Sequence[ShardRecord]) -> dict[str, Any]:
    """A split in the manifest: totals, and the shards by column."""
    return {
        "tokens": sum(record.tokens for record in records),
        "documents": sum(record.documents for record in records),
        "text_bytes": sum(record.text_bytes for record in records),
        "shards": {field.name: [getattr(record, field.name) for record in records] for field in fields(ShardRecord)},
    }


def shard_records(manifest: dict[str, Any], source: str, split: str) -> list[ShardRecord]:
    """The shards of a split of a source, in order."""
    columns = manifest["sources"][source]["splits"][split]["shards"]
    return [ShardRecord(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def write_digests(folder: Path, source: str, digests: Mapping[str, Sequence[NDArray[np.uint64]]]) -> dict[str, Any]:
    """Writes the block digests of a source, split by split and shard by shard in order, and describes the file."""
    joined = {split: np.concatenate([*parts, np.empty(0, np.uint64)]) for split, parts in digests.items()}
    name = f"{source}/{DIGESTS_NAME}"
    atomic_write(folder / name, safetensors.numpy.save(joined))
    return describe_file(folder, name)


def open_digests(folder: Path, manifest: dict[str, Any], source: str) -> dict[str, NDArray[np.uint64]]:
    """The block digests of a source by split, mapped: those of a shard begin where the blocks of all before it end.

    Raises:
        DataError: the file is not the one the manifest was made with.
    """
    described = manifest["sources"][source]["digests"]
    path = folder / described["file"]
    with os_errors_explained(path):
        data = map_file(path)
    found = hashlib.sha256(data).hexdigest()
    if found != described["sha256"]:
        raise DataError(
            f"the digests {path} are not those of this data: their sha256 is {found} and the manifest says "
            f"{described['sha256']}: delete the folder {folder} and prepare the data again"
        )
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    result = {}
    for split in SPLITS:
        start, stop = header[split]["data_offsets"]
        result[split] = np.frombuffer(data, "<u8", (stop - start) // 8, 8 + length + start)
    return result


def map_file(path: Path) -> mmap.mmap | bytes:
    """The content of a file, mapped: pages are read when they are touched, and shared with other processes."""
    with path.open("rb") as file:
        empty = path.stat().st_size == 0  # which cannot be mapped
        return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest, but for the fingerprint itself and ``about``, which tells how the data came about."""
    decisive = {key: value for key, value in manifest.items() if key not in ("fingerprint", "about")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Adds the fingerprint and writes the manifest; the data set is finished with it."""
    whole = manifest | {"fingerprint": fingerprint_of(manifest)}
    atomic_write(folder / MANIFEST_NAME, json.dumps(whole, indent=1) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, checked against its own fingerprint.

    Raises:
        DataError: missing, damaged, edited or of another version.
    """
    remedy = f"delete the folder {path.parent} and prepare the data again"
    with os_errors_explained(path):
        if not path.is_file():
            raise DataError(f"there is no prepared data at {path}: prepare it first")
        data = path.read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(data)
        kind = (manifest["format"], manifest["version"])
        said, computed = manifest["fingerprint"], fingerprint_of(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the manifest {path} is damaged ({error!r}): {remedy}") from error
    if kind != (FORMAT, VERSION):
        raise DataError(
            f"{path} is {kind[0]} version {kind[1]}; this program reads {FORMAT} version {VERSION}: {remedy}"
        )
    if said != computed:
        raise DataError(
            f"the manifest {path} was changed after it was written: it says the fingerprint {said} and its content "
            f"has {computed}: {remedy}"
        )
    return manifest
