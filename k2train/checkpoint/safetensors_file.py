"""Files in safetensors' format (github.com/huggingface/safetensors): hashed as they are written, mapped to be read.

A file is the length of the header (8 bytes, little endian), the header (JSON: dtype, shape and place of each tensor),
and the tensors' bytes one after the other. The library reads these files too; it does not hash what it writes, and
copies what it reads once more.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from k2train.checkpoint.manifest import CheckpointError, FileRecord

CHUNK = 1 << 24  # bytes written or hashed at once
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH = {name: dtype for dtype, name in DTYPES.items()}

Bytes = npt.NDArray[np.uint8]


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Writes tensors of any device as one file, synced to disk.

    Raises:
        OSError: it cannot be written (permission, space); it names the file.
    """
    # The widest first, so that each is aligned to its own width.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in ordered:
        places = [position, position := position + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = xxhash.xxh3_128(), 0
    try:
        with open(path, "wb", buffering=0) as file:
            for view in (memoryview(struct.pack("<Q", len(text)) + text), *(_bytes(t) for _, t in ordered)):
                while view:
                    written = file.write(view[:CHUNK])  # it may be less: the end of the disk
                    digest.update(view[:written])
                    view, size = view[written:], size + written
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return FileRecord(size, digest.hexdigest())


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory if it is in one piece on the CPU, else a copy."""
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data


def read_header(path: Path) -> dict[str, Any]:
    """Of each tensor its ``dtype``, ``shape`` and ``data_offsets``, in the order of the file.

    Raises:
        CheckpointError: it is no such file.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return _header(file.read(length) if length <= path.stat().st_size else b"", path)


def _header(text: bytes, path: Path) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path.name} is no safetensors file") from error
    return header


class SafetensorsFile:
    """A file mapped into memory: what is not read is not loaded, and what is read twice is loaded once."""

    def __init__(self, path: Path) -> None:
        """Maps the file. Raises OSError if it cannot be opened, CheckpointError if it is empty."""
        self.path = path
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"{path.name} is empty")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._map)

    def hash(self) -> str:
        """xxh3-128 of the whole file, as hex."""
        return xxhash.xxh3_128_hexdigest(self._map)

    @cached_property
    def header(self) -> dict[str, Any]:
        """As ``read_header`` gives it."""
        return _header(self._map[8 : 8 + self._length], self.path)

    @cached_property
    def _length(self) -> int:
        return int.from_bytes(self._map[:8], "little")

    def bytes(self, name: str, start: int, stop: int) -> Bytes:
        """The memory of elements [start, stop) of a flattened tensor; not to be written to.

        Raises:
            CheckpointError: the file holds no such elements.
        """
        entry = self.header.get(name)
        if entry is None or not 0 <= start <= stop <= math.prod(entry["shape"]):
            raise CheckpointError(f"{self.path} holds no elements {start} to {stop} of {name}")
        width = TORCH[entry["dtype"]].itemsize
        begin = 8 + self._length + entry["data_offsets"][0]
        return np.frombuffer(self._map, np.uint8, (stop - start) * width, begin + start * width)
