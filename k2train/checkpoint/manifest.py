"""The first page of a checkpoint: which files and tensors there are, and all state that is no tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

FORMAT = 2
MANIFEST = "manifest.json"

# The text vouches for itself: it begins with the hash of all that follows it.
_OPENING = '{"xxh3_128":"'
_AFTER = len(_OPENING) + 32


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


@dataclass(frozen=True)
class FileRecord:
    """One file of the checkpoint."""

    size: int  # bytes
    xxh3_128: str  # hex digest of the whole file


@dataclass(frozen=True)
class TensorRecord:
    """A global tensor; where its parts are is in the table of segments."""

    shape: tuple[int, ...]
    dtype: str  # as torch prints it without "torch."


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint.

    ``tensors`` is keyed ``NAME/KEY``: the global name of a parameter or buffer, and what of it (``master``,
    ``momentum``, ...). ``state`` is whatever else decides the future, as JSON.
    """

    step: int
    files: Mapping[str, FileRecord]  # segments are numbered by this order
    tensors: Mapping[str, TensorRecord]
    state: Mapping[str, Any]

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        contents = {
            "format": FORMAT,
            "step": self.step,
            "files": [{"name": n, "bytes": f.size, "xxh3_128": f.xxh3_128} for n, f in self.files.items()],
            "tensors": {key: {"shape": list(t.shape), "dtype": t.dtype} for key, t in self.tensors.items()},
            "state": self.state,
        }
        rest = '",' + json.dumps(contents, separators=(",", ":"))[1:] + "\n"
        return _OPENING + xxhash.xxh3_128_hexdigest(rest.encode()) + rest

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of ``to_json``.

        Raises:
            CheckpointError: the text is no manifest, a damaged one, or one of a format this version does not read.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise CheckpointError(
                    f"it has format {data['format']}, this version reads {FORMAT}: finish the run with the k2train "
                    "that began it, or begin anew under another name"
                )
            if text[:_AFTER] != _OPENING + xxhash.xxh3_128_hexdigest(text[_AFTER:].encode()):
                raise CheckpointError(f"{MANIFEST} is damaged: its hash is not the one it begins with")
            return cls(
                step=int(data["step"]),
                files={f["name"]: FileRecord(int(f["bytes"]), str(f["xxh3_128"])) for f in data["files"]},
                tensors={key: TensorRecord(tuple(t["shape"]), str(t["dtype"])) for key, t in data["tensors"].items()},
                state=data["state"],
            )
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"{MANIFEST} is damaged ({error})") from error
