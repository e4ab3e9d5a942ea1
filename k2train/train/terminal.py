"""What the person sees of a run: a live panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from k2train.train.hooks import Hook
from k2train.train.sparkline import Sparkline
from k2train.units import count, duration

# Seconds between two drawings of the panel: steps of a small model are faster than eyes.
REFRESH = 0.2
# Steps that speed and time left are averaged over.
RECENT = 50
# Warnings that stay in the panel.
WARNINGS = 3


class Terminal(Hook):
    """The run as told to a person. As a context manager it owns the screen between start and end.

    Drawn by the training loop itself, with no thread beside it, and with the cursor left visible: whatever ends the
    process, even SIGKILL, the terminal stays usable.
    """

    def __init__(
        self,
        *,
        name: str,
        steps: int,
        log_every: int,
        stream: TextIO,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares; nothing is shown yet.

        Args:
            name: of the run.
            steps: of the whole run.
            log_every: steps between two plain lines, at least.
            stream: where to; a live panel if it is a terminal.
            enabled: False on ranks other than 0, for which every method then does nothing.
            clock: seconds that never run backwards.
        """
        self._name, self._steps, self._log_every = name, steps, log_every
        self._enabled, self._clock = enabled, clock
        self._console = Console(file=stream, highlight=False, soft_wrap=False)
        self._is_live = stream.isatty() and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._drawn_at, self._told_at = -math.inf, 0
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=RECENT + 1)  # clock, step, tokens
        self._record: Mapping[str, Any] | None = None
        self._telemetry: Mapping[str, Any] | None = None  # the last record that has it
        self._validation: Mapping[str, Any] | None = None
        self._losses = Sparkline()
        self._warnings: deque[str] = deque(maxlen=WARNINGS)

    def __enter__(self) -> Terminal:
        if self._enabled and self._is_live:
            self._fit()
            self._live = Live(
                self._panel(),
                console=self._console,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start(refresh=True)
            self._console.show_cursor(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._live:
            live, self._live = self._live, None
            live.update(self._panel())
            live.stop()

    def say(self, text: str) -> None:
        """A sentence; above the panel where there is one."""
        if self._enabled:
            self._fit()
            self._console.print(Text(text), soft_wrap=not self._is_live)

    def warn(self, text: str) -> None:
        """A sentence that also stays in the panel, until three others have come."""
        self._warnings.append(text)
        self.say(text)

    def catch_up(self, steps: Iterable[Mapping[str, Any]], validations: Iterable[Mapping[str, Any]]) -> None:
        """Begins with what was recorded before, of which the last is shown."""
        self._recent.clear()
        self._losses, self._record, self._telemetry, self._validation = Sparkline(), None, None, None
        for record in steps:
            self._take(record, record["elapsed"])
        if self._record is not None and not self._live:
            self._tell()
        for record in validations:
            self._validation = record
        if self._validation is not None:
            self.validation(self._validation)
        self._draw()

    def log(self, record: Mapping[str, Any]) -> None:
        """Shows the metrics of the last steps, as they are written to metrics.jsonl."""
        if not self._enabled:
            return
        now, first = self._clock(), self._record is None
        self._take(record, now)
        last = record["step"] == self._steps
        if self._live:
            if first or last or now - self._drawn_at >= REFRESH:
                self._draw()
        elif first or last or record["step"] // self._log_every > self._told_at // self._log_every:
            self._tell()

    def incident(self, record: Mapping[str, Any]) -> None:
        """Says what was out of the ordinary in a step."""
        found = record["incident"]
        end = {
            "skipped": ", so nothing was updated",
            "rewound": f", so the run goes back to step {found.get('to', 0):,} and leaves out what led here",
        }.get(found["action"], "")
        self.warn(f"step {record['step']:,}: {found['sentence']}{end}")

    def warning(self, record: Mapping[str, Any]) -> None:
        """Says what goes wrong slowly."""
        self.warn(f"step {record['step']:,}: {record['incident']['sentence']}")

    def validation(self, record: Mapping[str, Any]) -> None:
        """Shows the loss on held-out text."""
        if not self._enabled:
            return
        self._validation = record
        what = "all that is held out" if record["whole"] else "held out"
        parts = ", ".join(f"{name} {_number(f['bits_per_byte'], '.4f')}" for name, f in record["sets"].items())
        told = {"next_line_accuracy": "next line", "valid_syntax": "syntax"}
        scores = "".join(f"; {short} {_number(record[name], '.2f')}" for name, short in told.items() if name in record)
        self.say(
            f"step {record['step']:,}: {what} {_number(record['validation_bits_per_byte'], '.4f')} bits/byte "
            f"(loss {_number(record['validation_loss'], '.4f')}){parts and f': {parts}'}{scores}"
        )
        self._draw()

    # ---- drawing

    def _take(self, record: Mapping[str, Any], now: float) -> None:
        if self._record is not None and record["step"] <= self._record["step"]:  # the run has gone back
            self._recent.clear()
            self._told_at = 0
        self._record = record
        if "utilisation" in record:
            self._telemetry = record
        self._recent.append((now, record["step"], record["tokens"]))
        self._losses.add(record["loss"])

    def _tell(self) -> None:
        assert self._record is not None
        self._told_at = self._record["step"]
        self.say(self._line())

    def _fit(self) -> None:
        """Follows the size of the terminal, which rich looks for at descriptors 1 and 2: the log has those."""
        if self._is_live:
            columns, lines = os.get_terminal_size(self._console.file.fileno())
            if columns and lines:  # a terminal that does not know its size says 0
                self._console.size = (columns, lines)

    def _draw(self) -> None:
        if self._live:
            self._fit()
            self._live.update(self._panel(), refresh=True)
            self._drawn_at = self._clock()

    def _tokens_per_second(self) -> float:
        """Over the recent steps, or what the only step says of itself."""
        (begin, _, before), (end, _, after) = self._recent[0], self._recent[-1]
        if end > begin:
            return (after - before) / (end - begin)
        assert self._record is not None
        return float(self._record["tokens_per_second"])

    def _time_left(self) -> float:
        """Seconds at the recent speed, validation and checkpoints among the steps included; NaN after one step."""
        (begin, before, _), (end, after, _) = self._recent[0], self._recent[-1]
        return (self._steps - after) * (end - begin) / (after - before) if after > before else math.nan

    def _line(self) -> str:
        assert self._record is not None
        record, left = self._record, self._time_left()
        parts = [
            f"step {record['step']:>{len(f'{self._steps:,}')},}/{self._steps:,}",
            f"{count(record['tokens'])} tokens",
            f"loss {_number(record['loss'], '.4f')}",
            f"{_number(record['bits_per_byte'], '.4f')} bits/byte",
            f"lr {_number(record['lr'], '.2e')}",
            f"grad norm {_number(record['grad_norm'], '.3g')}",
            f"max logit {_number(record['max_logit'], '.1f')}",
            f"clipped heads {record['clipped_heads']}",
            f"{count(self._tokens_per_second())} tokens/s",
        ]
        if math.isfinite(left):
            parts.append(f"{duration(left)} left")
        return " | ".join(parts)

    def _course(self) -> Iterator[Text]:
        """The loss since the start, and what a person should look at."""
        if self._console.encoding.startswith("utf"):
            room = max(1, self._console.width - len("loss ") - 4)  # the border and its padding
            yield Text.assemble(("loss ", "dim"), (self._losses.draw(room), "cyan"))
        for text in self._warnings:
            yield Text(text, style="yellow", overflow="ellipsis", no_wrap=True)

    def _panel(self) -> Panel:
        record, validation = self._record, self._validation
        done = record["step"] if record else 0
        status = f"step {done:,}/{self._steps:,}"
        if record is None:
            body: Group = Group(Text("waiting for the first step", style="dim"))
        else:
            left = self._time_left()
            if math.isfinite(left) and done < self._steps:
                status += f" · {duration(left)} left"
            cells = [
                ("loss", _number(record["loss"], ".4f")),
                ("bits/byte", _number(record["bits_per_byte"], ".4f")),
                ("held out", _number(validation["validation_bits_per_byte"], ".4f") if validation else "-"),
                ("tokens", count(record["tokens"])),
                ("tokens/s", count(self._tokens_per_second())),
                ("lr", _number(record["lr"], ".2e")),
                ("max logit", _number(record["max_logit"], ".1f")),
                ("clipped heads", str(record["clipped_heads"])),
                ("grad norm", _number(record["grad_norm"], ".3g")),
                *(_telemetry_cells(self._telemetry) if self._telemetry else ()),
            ]
            bar = Table.grid(expand=True)  # as rich's bar does not end its line
            bar.add_row(ProgressBar(total=self._steps, completed=done, complete_style="cyan", finished_style="green"))
            body = Group(bar, _grid(cells, columns=3), *self._course())
        return Panel(
            body,
            title=Text(self._name, style="bold", overflow="ellipsis"),
            subtitle=Text(status),
            title_align="left",
            subtitle_align="right",
        )


def _telemetry_cells(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    seconds = record["seconds"]
    waiting = sum(seconds.get(part, 0.0) for part in ("data", "communication")) / seconds["step"]
    yield "of peak", _number(record["utilisation"], ".1%")
    yield "waiting", _number(waiting, ".1%")  # for data and for other processes
    if violations := record.get("expert_max_violation"):
        yield "violation", _number(max(violations.values()), ".2f")


def _grid(cells: list[tuple[str, str]], *, columns: int) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in range(columns):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(style="bold", justify="right", no_wrap=True, min_width=8)
        grid.add_column(ratio=1)
    for start in range(0, len(cells), columns):
        grid.add_row(*(text for label, value in cells[start : start + columns] for text in (label, value, "")))
    return grid


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, pattern)
