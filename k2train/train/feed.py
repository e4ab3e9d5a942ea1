"""The batches of a rank, read ahead of the steps that take them."""

from __future__ import annotations

from collections.abc import Generator
from itertools import chain

from k2train.comm import World
from k2train.data import TrainStream
from k2train.data.reader import Batch
from k2train.train.phases import Plan, Step
from k2train.train.watchdog import beat


class Feed:
    """Gives each step its batches; one thread reads those of the next step while this one is computed."""

    def __init__(self, stream: TrainStream, plan: Plan, *, world: World) -> None:
        """Reads nothing yet."""
        self._stream, self._plan, self._world = stream, plan, world
        self._next = 0  # the step that the thread's batches go on with
        self._batches: Generator[Batch] | None = None

    def take(self, step: Step) -> list[Batch]:
        """This rank's share of the step; reading ahead begins with the first step that is asked for.

        Raises:
            DataError: what was read is not what was prepared.
        """
        beat(f"step {step.number + 1}: reading data")
        if self._batches is None or self._next != step.number:
            self.close()
            self._batches = self._read_from(step)
        self._next = step.number + 1
        return [next(self._batches) for _ in self._parts(step)]

    def close(self) -> None:
        """Ends the thread."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _read_from(self, step: Step) -> Generator[Batch]:
        steps = map(self._plan.step, range(step.number, self._plan.steps))
        whole = max(max(phase.batches) // phase.micro_batch_size for phase in self._plan.phases) // self._world.size
        return self._stream.batches(
            chain.from_iterable(map(self._parts, steps)), ahead=whole, pin=self._world.device.type == "cuda"
        )

    def _parts(self, step: Step) -> list[range]:
        return step.micro_batches(rank=self._world.rank, processes=self._world.size)
