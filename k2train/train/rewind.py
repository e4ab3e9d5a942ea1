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
from typing import TYPE_CHECKING

from k2train.checkpoint import Checkpoint
from k2train.comm import World, together
from k2train.data import TrainStream
from k2train.paths import atomic_write
from k2train.train.phases import Plan, Step
from k2train.train.watchdog import beat

if TYPE_CHECKING:
    from k2train.train.saving import Saver


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


class Rewinds:
    """Those of a run, and whether there is another one.

    Attributes:
        done: in the order in which they happened.
    """

    def __init__(self, path: Path, *, limit: int, window: int) -> None:
        """Args are the file of the run, ``monitor.rewinds`` and ``monitor.rewind_window``."""
        self._path, self._limit, self._window = path, limit, window
        self.done = read_rewinds(path)

    @property
    def used_up(self) -> bool:
        """Whether the run may not go back once more."""
        return len(self.done) >= self._limit

    def find(self, step: Step, *, plan: Plan, stream: TrainStream, saver: Saver) -> tuple[Rewind, Checkpoint] | None:
        """The way back to before the window that ends with a step; None if there is no checkpoint, or no rewind left.

        Args:
            step: that was out of the ordinary.
            plan: of the run.
            stream: as the run has read it.
            saver: of its checkpoints.
        """
        first = step.number + 1 - self._window
        if first < 0 or self.used_up:
            return None
        beat("looking for a checkpoint to go back to")
        checkpoint = saver.newest(until=first)
        if checkpoint is None:
            return None
        number = stream.samples.skips.stream_number
        left_out = number(plan.samples_before(first)), number(step.first_sample + step.samples - 1)
        return Rewind(step.number + 1, checkpoint.manifest.step, left_out), checkpoint

    def add(self, rewind: Rewind, *, world: World) -> None:
        """Puts it down, on disk too; called by all ranks together. Raises OSError if the disk refuses."""
        self.done.append(rewind)
        with together():
            if world.main:
                write_rewinds(self._path, self.done)
