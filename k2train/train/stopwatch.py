"""Where the time of a run goes: seconds by part, of the host or, for what a GPU computes, of the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

# Parts that a GPU works on after the host has moved on: their ends are marked in its queue.
ON_DEVICE = ("forward_backward", "optimizer", "update")


class Stopwatch:
    """Adds up seconds by part until they are taken. Parts may lie within each other."""

    def __init__(self, *, device: torch.device, enabled: bool = True) -> None:
        """At zero.

        Args:
            device: that computes.
            enabled: False: every method does nothing.
        """
        self._cuda, self._enabled = device.type == "cuda", enabled
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._begun: dict[str, float | torch.cuda.Event] = {}
        self._marked: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, part: str) -> None:
        """A part begins."""
        if self._enabled:
            self._begun[part] = self._mark() if self._cuda and part in ON_DEVICE else time.perf_counter()

    def stop(self, part: str) -> None:
        """It ends."""
        if (begin := self._begun.pop(part, None)) is None:
            return
        if isinstance(begin, float):
            self._seconds[part] += time.perf_counter() - begin
        else:
            self._marked.append((part, begin, self._mark()))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A block that is a part."""
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    @contextmanager
    def waits(self, part: str) -> Iterator[None]:
        """A block whose waiting for other processes is a part. On a GPU the host does not wait: nothing is told."""
        if self._cuda or not self._enabled or not dist.is_initialized() or dist.get_world_size() == 1:
            yield
            return
        work: Any = dist.Work  # every collective of torch ends in its wait, and those of DeepSpeed are torch's
        wait = work.wait

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return wait(*args, **kwargs)

        work.wait = timed
        try:
            yield
        finally:
            work.wait = wait

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last time; on a GPU it waits for what is computed."""
        for part, begin, end in self._marked:
            end.synchronize()
            self._seconds[part] += begin.elapsed_time(end) / 1000
        found, self._seconds, self._marked = dict(self._seconds), defaultdict(float), []
        return found

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
