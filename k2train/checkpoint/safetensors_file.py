"""Files in safetensors' format (github.com/huggingface/safetensors): hashed as they are written, mapped to be read.

A file is the length of the header (8 bytes, little endian), the header (JSON: dtype, shape and place of each tensor),
and the tensors' bytes one after the other. The library reads these files too; it does not hash what it writes, and
copies what it reads once more.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH = {name: dtype for dtype, name in DTYPES.items()}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when it is written and then forgotten, so that a file may be larger than memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that it will take."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor | Deferred]) -> FileRecord:
    """Writes tensors of any device as one file, synced to disk.

    Raises:
        OSError: it cannot be written (permission, space); it names the file.
    """
    # The widest first, so that each is aligned to its own width.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
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
            head = memoryview(struct.pack("<Q", len(text)) + text)
            for view in itertools.chain([head], (_bytes(tensor) for _, tensor in ordered)):
                while view:
                    written = file.write(view[:CHUNK])  # it may be less: the end of the disk
                    digest.update(view[:written])
                    view, size = view[written:], size + written
                view.release()  # before the next one is made
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return FileRecord(size, digest.hexdigest())


def _bytes(tensor: torch.Tensor | Deferred) -> memoryview:
    """The tensor's memory if it is in one piece on the CPU, else a copy."""
    if isinstance(tensor, Deferred):
        made = tensor.make()
        assert (tuple(made.shape), made.dtype) == (tensor.shape, tensor.dtype)
        tensor = made
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
    """A file whose tensors are mapped into memory one by one, while they are used: what is not read is not loaded."""

    def __init__(self, path: Path) -> None:
        """Opens the file. Raises OSError if it cannot be opened, CheckpointError if it is empty."""
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 - for as long as this object lives
        self.size = os.fstat(self._file.fileno()).st_size  # bytes
        if self.size == 0:
            raise CheckpointError(f"{path.name} is empty")

    def hash(self) -> str:
        """xxh3-128 of the whole file, as hex."""
        digest = xxhash.xxh3_128()
        for start in range(0, self.size, CHUNK):
            digest.update(self._map(start, min(start + CHUNK, self.size)).data)
        return digest.hexdigest()

    @cached_property
    def header(self) -> dict[str, Any]:
        """As ``read_header`` gives it."""
        stop = 8 + self._length
        return _header(self._map(8, stop).tobytes() if stop <= self.size else b"", self.path)

    @cached_property
    def _length(self) -> int:
        return int.from_bytes(self._map(0, min(8, self.size)).tobytes(), "little")

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
        if begin + stop * width > self.size:
            raise CheckpointError(f"{self.path} ends before {name} does: it was not copied whole")
        return self._map(begin + start * width, begin + stop * width)

    def _map(self, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of the file, mapped until the array is let go of."""
        if start == stop:
            return np.empty(0, np.uint8)
        lead = start % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(self._file.fileno(), lead + stop - start, access=mmap.ACCESS_READ, offset=start - lead)
        return np.frombuffer(pages, np.uint8, stop - start, lead)
