"""How the preparation of data is shown: bars on a terminal, a line a stage anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from k2train.units import duration, memory

SILENCE = 30.0  # seconds between two lines of a stage where there is no terminal
STAGES = {
    "wait": "waiting for another process that prepares the same data",
    "read": "reading the text",
    "tokenizer": "making the tokenizer",
    "encode": "encoding the text",
}


class PrepareProgress:
    """Called with (stage, done, total) by ``k2train.data.prepare``; shows nothing if it is never called."""

    def __init__(self, stream: TextIO, *, enabled: bool = True) -> None:
        """Prepares; nothing is shown yet.

        Args:
            stream: where to; bars if it is a terminal.
            enabled: False on ranks other than 0.
        """
        self._console = Console(file=stream, highlight=False)
        self._enabled = enabled
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, float] = {}
        self._told = 0.0

    def __enter__(self) -> PrepareProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Shows that ``done`` of ``total`` of a stage are done."""
        if not self._enabled:
            return
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._draw(stage, done, total)
        elif stage not in self._begun:
            self._begun[stage] = self._told = time.monotonic()
            self._console.print(f"preparing the data: {STAGES[stage]}", soft_wrap=True)
        elif (now := time.monotonic()) - self._told >= SILENCE and 0 < done < total:
            self._told = now
            rate = done / (now - self._begun[stage])
            self._console.print(
                f"preparing the data: {STAGES[stage]}: {100 * done // total} % at {memory(rate)}/s, "
                f"{duration((total - done) / rate)} left",
                soft_wrap=True,
            )

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._bars is None:
            left = TimeRemainingColumn(elapsed_when_finished=True)
            columns = TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), left
            self._bars = Progress(*columns, console=self._console)
            self._bars.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(STAGES[stage], total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
