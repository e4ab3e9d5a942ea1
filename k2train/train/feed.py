"""The batches of a rank, read ahead of the steps that take them."""

from __future__ import annotations

from collections.abc import Generator

from k2train.comm import World
from k2train.data import TrainStream
from k2train.data.reader import Batch
from k2train.model import SequenceParallel
from k2train.train.phases import Plan, Step
from k2train.train.watchdog import beat


class Feed:
    """Gives each step its batches; one thread reads those of the next step while this one is computed."""

    def __init__(
        self, stream: TrainStream, plan: Plan, *, world: World, sequence_parallel: SequenceParallel | None = None
    ) -> None:
        """Reads nothing yet.

        Args:
            stream: of the run.
            plan: of the run.
            world: the run's processes.
            sequence_parallel: those that share out sequences: they get the same samples, and of these each its part.
        """
        self._stream, self._plan, self._world = stream, plan, world
        self._sequence_parallel = sequence_parallel
        self._sharing = 1 if sequence_parallel is None else sequence_parallel.size
        self._next = 0  # the step that the thread's batches go on with
        self._steps: Generator[list[Batch]] | None = None

    def take(self, step: Step) -> list[Batch]:
        """This rank's share of the step; reading ahead begins with the first step that is asked for.

        Where sequences are shared out, tokens and labels are this rank's part of them, starts those of the whole.

        Raises:
            DataError: what was read is not what was prepared.
        """
        beat(f"step {step.number + 1}: reading data")
        if self._steps is None or self._next != step.number:
            self.close()
            self._steps = self._read_from(step)
        self._next = step.number + 1
        batches = next(self._steps)
        if self._sequence_parallel is None:
            return batches
        part = self._sequence_parallel.part(step.phase.sequence_length)
        return [(tokens_BT[:, part], labels_BT[:, part], starts_BT) for tokens_BT, labels_BT, starts_BT in batches]

    def follow(self, stream: TrainStream) -> None:
        """Reads from another stream from now on."""
        self.close()
        self._stream = stream

    def close(self) -> None:
        """Ends the thread."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def _read_from(self, step: Step) -> Generator[list[Batch]]:
        steps = map(self._plan.step, range(step.number, self._plan.steps))
        return self._stream.steps(map(self.parts, steps), pin=self._world.device.type == "cuda")

    def parts(self, step: Step) -> list[range]:
        """The samples of each micro-batch of this rank."""
        return step.micro_batches(rank=self._world.rank // self._sharing, processes=self._world.size // self._sharing)
