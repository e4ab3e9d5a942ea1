"""The profiler: of chosen steps a trace of torch's, for chrome://tracing or Perfetto, and of the GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from k2train.train.hooks import Hook
from k2train.train.phases import Step

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer

# Allocations that a snapshot goes back over; a step of a large model makes some ten thousand.
HISTORY = 1_000_000


class Profiler(Hook):
    """Writes ``step-N-rank-R.trace.json.gz`` of each chosen step: operators, shapes, allocations.

    On a GPU also ``step-N-rank-R.memory.pickle``, which https://pytorch.org/memory_viz draws: every allocation of the
    step with the line of code that made it. Such a step takes longer than others.
    """

    def __init__(self, steps: Sequence[int], folder: Path) -> None:
        """Chooses.

        Args:
            steps: as metrics.jsonl counts them, from 1.
            folder: made when it is needed.
        """
        self._steps, self._folder = frozenset(steps), folder
        self._profile: profile | None = None

    def start(self, trainer: Trainer) -> None:
        """Notes the rank."""
        self._rank, self._cuda = trainer.world.rank, trainer.world.device.type == "cuda"

    def before_step(self, step: Step) -> None:
        """Begins, if this step is chosen."""
        if step.number + 1 not in self._steps:
            return
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def after_step(self, step: Step, *, applied: bool) -> None:
        """Writes what was seen."""
        if self._profile is None:
            return
        if self._cuda:
            torch.cuda.synchronize()
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self._folder}/step-{step.number + 1:08d}-rank-{self._rank}"
        self._profile.export_chrome_trace(f"{stem}.trace.json.gz")
        self._profile = None
        if self._cuda:
            torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
