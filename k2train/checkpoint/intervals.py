"""Intervals of flattened global tensors: one file a rank when written, any cut of them when read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from k2train.checkpoint.manifest import CheckpointError, FileRecord, Manifest

CHUNK = 1 << 24  # bytes hashed at once


@dataclass(frozen=True)
class Interval:
    """Elements [start, start + len(values)) of a flattened global tensor."""

    name: str  # global name of a parameter or buffer
    key: str  # what of it: master, momentum, exp_avg, ...
    start: int
    values: torch.Tensor  # 1-D

    @property
    def tensor(self) -> str:
        """The key of the global tensor in the manifest."""
        return f"{self.name}/{self.key}"


def write_intervals(path: Path, intervals: Sequence[Interval]) -> FileRecord:
    """Writes a rank's intervals as one safetensors file, synced to disk.

    Raises:
        OSError: it cannot be written (permission, space).
    """
    tensors = {f"{i.tensor}/{i.start}": i.values.detach().contiguous().cpu() for i in intervals}
    try:
        save_file(tensors, path)
    except OSError:
        raise
    except Exception as error:  # safetensors wraps the system's error in its own; the number is only in its text
        raise _as_oserror(error, path) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return FileRecord(path.stat().st_size, file_hash(path))


def file_hash(path: Path) -> str:
    """xxh3-128 of a file, as hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class IntervalReader:
    """Reads any interval of any tensor of a checkpoint, whatever layout wrote it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._open: dict[str, safe_open] = {}

    def fill(self, name: str, key: str, start: int, out: torch.Tensor) -> None:
        """Fills ``out`` (1-D) with elements [start, start + len(out)) of tensor ``name``/``key``.

        Raises:
            CheckpointError: the checkpoint does not hold them.
        """
        tensor = f"{name}/{key}"
        if tensor not in self._manifest.tensors:
            raise CheckpointError(f"{self._folder} holds no {key} of {name}: it is a checkpoint of another model")
        stop, filled = start + len(out), 0
        for segment in self._manifest.tensors[tensor].segments:
            low, high = max(start, segment.start), min(stop, segment.stop)
            if low < high:
                file: Any = self._file(segment.file)
                values = file.get_slice(f"{tensor}/{segment.start}")
                out[low - start : high - start].copy_(values[low - segment.start : high - segment.start])
                filled += high - low
        if filled != len(out):
            raise CheckpointError(f"{self._folder} holds {filled} of the {len(out)} elements asked of {tensor}")

    def read(self, name: str, key: str) -> torch.Tensor:
        """A whole tensor in its shape, on the CPU."""
        if (record := self._manifest.tensors.get(f"{name}/{key}")) is None:
            raise CheckpointError(f"{self._folder} holds no {key} of {name}: it is a checkpoint of another model")
        out = torch.empty(record.shape, dtype=getattr(torch, record.dtype))
        self.fill(name, key, 0, out.view(-1))
        return out

    def _file(self, name: str) -> safe_open:
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt")
        return self._open[name]


def _as_oserror(error: Exception, path: Path) -> OSError:
    """safetensors says ``... (os error 28)``: give the number back to the exception."""
    text = str(error)
    if "os error " in text:
        number = int(text.split("os error ")[1].split(")")[0])
        return OSError(number, os.strerror(number), str(path))
    return OSError(f"{path} could not be written: {text}")
