"""Intervals of flattened global tensors: one file a rank when written, any cut of them when read.

Where each interval is stands in a table of its own (``segments.safetensors``), a sorted array a tensor: at stage 3 of
ZeRO a checkpoint has as many segments as parameters times processes, and a reader finds its own by bisection.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from k2train.checkpoint.manifest import CheckpointError, FileRecord, Manifest, TensorRecord
from k2train.checkpoint.safetensors_file import TORCH, Deferred, SafetensorsFile, read_header, write_safetensors

SEGMENTS = "segments.safetensors"


@dataclass(frozen=True)
class Place:
    """Where an interval of a flattened global tensor begins."""

    name: str  # global name of a parameter or buffer
    key: str  # what of it: master, momentum, exp_avg, ...
    start: int

    @property
    def tensor(self) -> str:
        """The key of the global tensor in the manifest."""
        return f"{self.name}/{self.key}"


@dataclass(frozen=True)
class Interval(Place):
    """Elements [start, start + len(values)) of a flattened global tensor."""

    values: torch.Tensor  # 1-D


@dataclass(frozen=True)
class DeferredInterval(Place):
    """An interval that is made when it is written."""

    values: Deferred  # 1-D


def write_intervals(path: Path, intervals: Sequence[Interval | DeferredInterval]) -> FileRecord:
    """Writes a rank's intervals as one file, synced to disk. Raises OSError if it cannot be written."""
    return write_safetensors(path, {f"{i.tensor}/{i.start}": i.values for i in intervals})


def read_segments(
    folder: Path, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, TensorRecord], dict[str, torch.Tensor]]:
    """What lies in files written by ``write_intervals``, from their headers.

    Args:
        folder: of the files.
        names: the files; their order numbers them.
        shapes: global shape by the name of a parameter or buffer. A tensor of any other name is flat.

    Returns:
        Of each tensor its record, and its segments: [n, 2], first element and number of the file, sorted.

    Raises:
        CheckpointError: a tensor's segments do not cover each of its elements exactly once.
        OSError: a file cannot be read.
    """
    cuts: dict[str, array[int]] = defaultdict(lambda: array("q"))  # start, stop, file; millions, so no objects
    dtypes: dict[str, str] = {}
    for number, name in enumerate(names):
        for entry, described in read_header(folder / name).items():
            tensor, _, start = entry.rpartition("/")
            first = int(start)
            cuts[tensor].extend((first, first + math.prod(described["shape"]), number))
            dtypes[tensor] = described["dtype"]
    tensors, tables = {}, {}
    for tensor, flat in cuts.items():
        segments = np.array(flat).reshape(-1, 3)
        segments = segments[segments[:, 0].argsort(kind="stable")]
        shape = shapes.get(tensor.rpartition("/")[0], (int(segments[-1, 1]),))
        check_tiling(tensor, segments, shape)
        tensors[tensor] = TensorRecord(shape, str(TORCH[dtypes[tensor]]).removeprefix("torch."))
        tables[tensor] = torch.from_numpy(segments[:, [0, 2]])
    return tensors, tables


def check_tiling(tensor: str, segments: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises CheckpointError unless sorted segments ([n, 3]: start, stop, file) cover each element exactly once."""
    starts, reached = segments[:, 0], np.concatenate(([0], segments[:-1, 1]))
    if (wrong := np.flatnonzero(starts != reached)).size:
        start, position = int(starts[wrong[0]]), int(reached[wrong[0]])
        fault = "are missing" if start > position else "are there twice"
        raise CheckpointError(f"elements {min(start, position)} to {max(start, position)} of {tensor} {fault}")
    if (end := int(segments[-1, 1])) != math.prod(shape):
        raise CheckpointError(f"{tensor} of shape {list(shape)} ends at element {end}")


class IntervalReader:
    """Reads any interval of any tensor of a checkpoint, whatever layout wrote it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._names = list(manifest.files)
        self._open: dict[str, SafetensorsFile] = {}

    def fill(self, name: str, key: str, start: int, out: torch.Tensor) -> None:
        """Fills ``out`` (1-D) with elements [start, start + len(out)) of tensor ``name``/``key``.

        Raises:
            CheckpointError: the checkpoint does not hold them.
        """
        tensor, stop = f"{name}/{key}", start + len(out)
        record = self._record(tensor)
        numel, dtype = math.prod(record.shape), getattr(torch, record.dtype)
        if not 0 <= start <= stop <= numel:
            raise CheckpointError(f"{self._folder} holds elements 0 to {numel} of {tensor}, not {start} to {stop}")
        table = self.segments(tensor)
        number = int(np.searchsorted(table[:, 0], start, side="right")) - 1
        position = start
        while position < stop:
            begin, file = (int(v) for v in table[number])
            end = min(stop, int(table[number + 1, 0]) if number + 1 < len(table) else numel)
            source = self.file(self._names[file]).bytes(f"{tensor}/{begin}", position - begin, end - begin)
            _copy(source, dtype, out[position - start : end - start])
            position, number = end, number + 1

    def read(self, name: str, key: str) -> torch.Tensor:
        """A whole tensor in its shape, on the CPU. Raises CheckpointError if the checkpoint does not hold it."""
        record = self._record(f"{name}/{key}")
        out = torch.empty(record.shape, dtype=getattr(torch, record.dtype))
        self.fill(name, key, 0, out.view(-1))
        return out

    def segments(self, tensor: str) -> np.ndarray:
        """[n, 2]: first element and number of the file of each segment, sorted."""
        table = self.file(SEGMENTS)
        (length, _) = table.header[tensor]["shape"] if tensor in table.header else (0, 2)
        return table.bytes(tensor, 0, 2 * length).view(np.int64).reshape(-1, 2)

    def file(self, name: str) -> SafetensorsFile:
        """One of the checkpoint's files, opened once."""
        if name not in self._open:
            self._open[name] = SafetensorsFile(self._folder / name)
        return self._open[name]

    def _record(self, tensor: str) -> TensorRecord:
        if (record := self._manifest.tensors.get(tensor)) is None:
            name, _, key = tensor.rpartition("/")
            raise CheckpointError(f"{self._folder} holds no {key} of {name}: it is a checkpoint of another model")
        return record


def _copy(source: np.ndarray, dtype: torch.dtype, out: torch.Tensor) -> None:
    if out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous():
        np.copyto(out.detach().view(torch.uint8).numpy(), source)  # twice as fast as torch's copy on one thread
    else:
        out.copy_(torch.from_numpy(source.copy()).view(dtype))
