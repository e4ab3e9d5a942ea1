"""The batches of a rank, read ahead of the steps that take them."""

from __future__ import annotations

from collections.abc import Generator

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
        self._steps: Generator[list[Batch]] | None = None

    def take(self, step: Step) -> list[Batch]:
        """This rank's share of the step; reading ahead begins with the first step that is asked for.

        Raises:
            DataError: what was read is not what was prepared.
        """
        beat(f"step {step.number + 1}: reading data")
        if self._steps is None or self._next != step.number:
            self.close()
            self._steps = self._read_from(step)
        self._next = step.number + 1
        return next(self._steps)

    def close(self) -> None:
        """Ends the thread."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def _read_from(self, step: Step) -> Generator[list[Batch]]:
        steps = map(self._plan.step, range(step.number, self._plan.steps))
        return self._stream.steps(map(self._parts, steps), pin=self._world.device.type == "cuda")

    def _parts(self, step: Step) -> list[range]:
        return step.micro_batches(rank=self._world.rank, processes=self._world.size)
