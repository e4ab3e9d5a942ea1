"""The numbers of a run: summed on the device from step to step, reduced over the ranks once a record.

metrics.jsonl has one JSON object a line; pictures and comparisons of runs are made from it. A record is of all steps
since the one before: losses are means over their tokens, what can be too large is the largest of any step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.paths import atomic_write
from k2train.train.hooks import Hook
from k2train.train.lines import Lines
from k2train.train.state import Progress

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer

SUMS = ("nats", "targets", "balance_loss", "max_logit_fallbacks", "clipped_steps")
# Sums are of multiples of these, which float64 adds exactly: a save between two records, which only a run that is
# stopped makes, changes the order of the additions, and must not change the last bit.
GRAINS = (2.0**-20, 1.0, 2.0**-40, 1.0, 1.0)
LARGEST = ("grad_norm", "max_logit", "clipped_heads", "balance_max")
COUNTS = ("steps", "skipped_steps", "tokens", "seconds")


class Meter:
    """What happened since the last record.

    Nothing here waits for a GPU until ``fold``, which is called for a record or a checkpoint. A checkpoint keeps what
    was folded, so that the records of a resumed run are those of an undisturbed one, bit for bit.
    """

    def __init__(self, progress: Progress, *, device: torch.device) -> None:
        """Empty.

        Args:
            progress: is told of the largest logit and the clipped steps of the whole run.
            device: of the sums.
        """
        self._progress, self._device = progress, device
        self._grains = torch.tensor(GRAINS, dtype=torch.float64, device=device)
        self._sums, self._largest = self._empty()
        self.totals, self.last_seconds = _nothing(), 0.0

    def add(self, *, sums: Mapping[str, Tensor], largest: Mapping[str, Tensor]) -> None:
        """An applied step.

        Args:
            sums: 0-d tensors of SUMS, this rank's part.
            largest: 0-d tensors of LARGEST, the same on all ranks.
        """
        added = torch.stack([sums[name].detach().to(self._device, torch.float64) for name in SUMS])
        self._sums += torch.round(added / self._grains) * self._grains
        step = torch.stack([largest[name].detach().to(self._device, torch.float64) for name in LARGEST])
        self._largest = torch.maximum(self._largest, step)

    def count(self, *, applied: bool, tokens: int, seconds: float) -> None:
        """Any step."""
        self.last_seconds = seconds
        for name, value in zip(COUNTS, (1, not applied, tokens, seconds), strict=True):
            self.totals[name] += value

    def fold(self) -> None:
        """Reduces over the ranks and fetches from the device what was added; called by all ranks together."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        values = torch.cat([self._sums, self._largest]).tolist()
        for name, value in zip(SUMS, values, strict=False):
            self.totals[name] += value
        for name, value in zip(LARGEST, values[len(SUMS) :], strict=True):
            self.totals[name] = max(self.totals[name], value)
        self._progress.clipped_steps += round(values[SUMS.index("clipped_steps")])
        self._progress.max_logit = max(self._progress.max_logit, self.totals["max_logit"])
        self._sums, self._largest = self._empty()

    def take(self) -> dict[str, float]:
        """Folds, returns the totals and begins anew; called by all ranks together."""
        self.fold()
        found, self.totals = self.totals, _nothing()
        return found

    def state_dict(self) -> dict[str, Any]:
        """What was folded, exactly."""
        return {name: repr(value) for name, value in self.totals.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self.totals = {name: float(value) for name, value in state.items()}
        self._sums, self._largest = self._empty()

    def _empty(self) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self._device)
        return sums, torch.full((len(LARGEST),), -math.inf, dtype=torch.float64, device=self._device)


def _nothing() -> dict[str, float]:
    return dict.fromkeys((*SUMS, *COUNTS), 0.0) | dict.fromkeys(LARGEST, -math.inf)


class MetricsFile(Hook):
    """Appends records to a file, whatever its disk does meanwhile; see ``Lines``."""

    def __init__(self, path: Path, *, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._lines: Lines | None = None

    def start(self, trainer: Trainer) -> None:
        """See ``open``."""
        self.open(resume_at=trainer.progress.step)

    def open(self, *, resume_at: int) -> None:
        """Opens the file, keeping the records of steps up to ``resume_at``, and of each time that the run went back."""

        def keep(record: Mapping[str, Any]) -> bool:
            return int(record["step"]) <= resume_at or is_rewind(record)

        self._lines = Lines(self._path, keep=keep, say=self._say)

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a record."""
        self.write(record)

    def validation(self, record: Mapping[str, Any]) -> None:
        """Appends a record."""
        self.write(record)

    def incident(self, record: Mapping[str, Any]) -> None:
        """Appends a record."""
        self.write(record)

    def warning(self, record: Mapping[str, Any]) -> None:
        """Appends a record."""
        self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; numbers that are not finite become null, which JSON has no word for."""
        assert self._lines is not None, "open it first"
        self._lines.write(_plain(record))

    def finish(self, *, failed: bool) -> None:
        """Closes the file."""
        if self._lines is not None:
            self._lines.close()


def is_rewind(record: Mapping[str, Any]) -> bool:
    """Whether it says that the run has gone back, which stays true of a run that goes back further."""
    return bool(record.get("incident", {}).get("action") == "rewound")


def keep_records(path: Path, *, until: int) -> None:
    """Drops from a file of records those after a step, and what a run that was killed has torn."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= until:
                kept.append(f"{line}\n")
    atomic_write(path, "".join(kept))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
