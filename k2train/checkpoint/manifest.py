"""The table of contents of a checkpoint: what is where, and how to tell that it is whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


@dataclass(frozen=True)
class FileRecord:
    """One file of the checkpoint."""

    size: int  # bytes
    xxh3_128: str  # hex digest of the whole file


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of a flattened global tensor and the file that holds them."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class TensorRecord:
    """A global tensor in pieces. ``segments`` are sorted and tile it exactly."""

    shape: tuple[int, ...]
    dtype: str  # as torch prints it without "torch."
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint.

    ``tensors`` is keyed ``NAME/KEY``: the global name of a parameter or buffer, and what of it (``master``,
    ``momentum``, ...). ``state`` is whatever else decides the future, as JSON.
    """

    step: int
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    state: Mapping[str, Any]

    def check_tiling(self) -> None:
        """Raises CheckpointError unless the segments of every tensor cover each of its elements exactly once."""
        for key, tensor in self.tensors.items():
            position = 0
            for segment in tensor.segments:
                if segment.start != position:
                    fault = "are missing" if segment.start > position else "are there twice"
                    span = sorted((position, segment.start))
                    raise CheckpointError(f"elements {span[0]} to {span[1]} of {key} {fault}")
                position = segment.stop
            if position != math.prod(tensor.shape):
                raise CheckpointError(f"{key} of shape {list(tensor.shape)} ends at element {position}")

    def to_json(self) -> str:
        """The text of ``manifest.json``; files are numbered in it, as there may be many segments."""
        numbers = {name: number for number, name in enumerate(self.files)}
        return json.dumps(
            {
                "format": FORMAT,
                "step": self.step,
                "files": [{"name": n, "bytes": f.size, "xxh3_128": f.xxh3_128} for n, f in self.files.items()],
                "tensors": {
                    key: {
                        "shape": list(t.shape),
                        "dtype": t.dtype,
                        "segments": [[numbers[s.file], s.start, s.stop] for s in t.segments],
                    }
                    for key, t in self.tensors.items()
                },
                "state": self.state,
            },
            indent=None,
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of ``to_json``.

        Raises:
            CheckpointError: the text is no manifest, or one of a format this version does not read.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise CheckpointError(
                    f"it has format {data['format']}, this version reads {FORMAT}: use the k2train that wrote it"
                )
            names = [f["name"] for f in data["files"]]
            return cls(
                step=int(data["step"]),
                files={f["name"]: FileRecord(int(f["bytes"]), str(f["xxh3_128"])) for f in data["files"]},
                tensors={
                    key: TensorRecord(
                        tuple(t["shape"]), str(t["dtype"]), tuple(Segment(names[f], a, b) for f, a, b in t["segments"])
                    )
                    for key, t in data["tensors"].items()
                },
                state=data["state"],
            )
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"its manifest is damaged ({error})") from error
