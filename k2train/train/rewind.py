"""Going back: a run whose numbers are out of the ordinary returns to a checkpoint, and on without what led there.

What is left out are the samples of a window of steps that ends with the one that was found. They are left out of the
order of samples for good, as those of ``data.order.skips`` are: the steps up to the window are taken again, bit for
bit, and the window's steps get the samples that come after it.

``rewinds.json`` in the run's folder is written before anything is undone. A run that is killed in between finds there
which of its checkpoints it has gone back behind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from k2train.paths import atomic_write


@dataclass(frozen=True)
class Rewind:
    """A time that a run has gone back."""

    step: int  # that was out of the ordinary, as metrics.jsonl counts
    to: int  # steps of the checkpoint
    left_out: tuple[int, int]  # the first and the last sample of the stream


def read_rewinds(path: Path) -> list[Rewind]:
    """All of a run, in the order in which they happened."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return [Rewind(entry["step"], entry["to"], (entry["left_out"][0], entry["left_out"][1])) for entry in found]


def write_rewinds(path: Path, rewinds: Sequence[Rewind]) -> None:
    """The inverse, whole or not at all."""
    atomic_write(path, json.dumps([asdict(rewind) for rewind in rewinds], indent=2) + "\n")
