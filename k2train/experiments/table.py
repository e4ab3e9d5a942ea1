"""The table of a sweep: a line for each combination of the varied settings, over seeds with intervals; its figures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k2train.experiments.statistics import Interval, interval
from k2train.experiments.sweep import Row, varied
from k2train.report import Chart, Series, named_lines, named_tiles

SEED = "seed"
RESULTS = ("validation_bits_per_byte", "validation_loss", "max_logit")


@dataclass(frozen=True)
class Line:
    """Runs that differ in their seeds alone."""

    choices: Mapping[str, Any]  # the varied settings, without the seed
    runs: int
    finished: int
    failures: Sequence[str]
    means: Mapping[str, Interval | None]  # of each result, over the finished runs; None where none has it


@dataclass(frozen=True)
class Table:
    """Lines in the order of their settings, numbers by their size."""

    keys: Sequence[str]
    results: Sequence[str]
    lines: Sequence[Line]

    def as_csv(self) -> str:
        """Comma-separated: settings, counts, of each result the mean and half of its 95 % interval, failures."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [name for result in self.results for name in (result, f"{result}_half_interval")]
        writer.writerow([*self.keys, "runs", "finished", *names, "failures"])
        for line in self.lines:
            means = [line.means[result] for result in self.results]
            numbers = [_written(value) for m in means for value in ((m.mean, m.half) if m else (None, None))]
            chosen = [_said(line.choices[key]) for key in self.keys]
            writer.writerow([*chosen, line.runs, line.finished, *numbers, "; ".join(line.failures)])
        return text.getvalue()

    def cells(self) -> list[list[str]]:
        """For people: a head, and the lines below it."""
        found = [[*self.keys, "runs", *self.results, "failures"]]
        for line in self.lines:
            runs = str(line.runs) if line.finished == line.runs else f"{line.finished} of {line.runs}"
            means = ["-" if (mean := line.means[result]) is None else str(mean) for result in self.results]
            found.append([*(_said(line.choices[key]) for key in self.keys), runs, *means, "; ".join(line.failures)])
        return found if any(line.failures for line in self.lines) else [cells[:-1] for cells in found]


def tabulate(rows: Sequence[Row], results: Sequence[str] = RESULTS) -> Table:
    """Gathers the runs of a sweep.

    Args:
        rows: of the sweep.
        results: keys of summary.json that are numbers.
    """
    keys = [key for key in varied(rows) if key != SEED]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: [_order(row.choices.get(key)) for key in (*keys, SEED)]):
        groups.setdefault(tuple(_said(row.choices.get(key)) for key in keys), []).append(row)
    lines = []
    for group in groups.values():
        finished = [row.results for row in group if row.results is not None]
        values = {key: [float(found[key]) for found in finished if found.get(key) is not None] for key in results}
        lines.append(
            Line(
                choices={key: group[0].choices.get(key) for key in keys},
                runs=len(group),
                finished=len(finished),
                failures=list(dict.fromkeys(row.failure for row in group if row.failure)),
                means={key: interval(numbers) if numbers else None for key, numbers in values.items()},
            )
        )
    return Table(keys, results, lines)


def figures(table: Table) -> list[Chart]:
    """Of each result curves over the setting that has most values, and of two settings a heat map."""
    if not table.keys:
        return []
    places = {key: _values(table, key) for key in table.keys}
    across = max(table.keys, key=lambda key: len(places[key]))
    others = [key for key in table.keys if key != across]
    charts = [_curves(table, result, across, places[across], others) for result in table.results]
    if len(others) == 1:
        charts += [_map(table, result, (across, others[0]), places) for result in table.results]
    return [chart for chart in charts if chart]


def _curves(table: Table, result: str, across: str, places: Sequence[str], others: Sequence[str]) -> Chart | None:
    groups: dict[str, dict[str, Interval | None]] = {}
    for line in table.lines:
        name = ", ".join(f"{key}={_said(line.choices[key])}" for key in others)
        groups.setdefault(name, {})[_said(line.choices[across])] = line.means[result]
    curves = []
    for colour, (name, found) in enumerate(groups.items()):
        means = [found.get(place) for place in places]
        curves.append(
            Series(
                name=name or result,
                x=range(len(places)),
                y=[math.nan if mean is None else mean.mean for mean in means],
                spread=[math.nan if mean is None else mean.half for mean in means],
                colour=colour,
                dots=True,
            )
        )
    return named_lines(result.replace("_", " "), f"over {across}", [_label(place) for place in places], curves)


def _map(table: Table, result: str, keys: tuple[str, str], places: Mapping[str, Sequence[str]]) -> Chart | None:
    across, down = keys
    found = {(_said(line.choices[down]), _said(line.choices[across])): line.means[result] for line in table.lines}
    rows = []
    for row in places[down]:
        means = [found.get((row, column)) for column in places[across]]
        rows.append((_label(row), [math.nan if mean is None else mean.mean for mean in means]))
    columns = [_label(place) for place in places[across]]
    return named_tiles(result.replace("_", " "), f"{down} down, {across} across", columns, rows)


def _values(table: Table, key: str) -> list[str]:
    every = sorted((line.choices[key] for line in table.lines), key=_order)
    return list(dict.fromkeys(map(_said, every)))


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers by their size, before everything else by its text."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number, value if number else 0.0, _said(value)


def _said(value: Any) -> str:
    """A setting in words; a group of which a run says nothing has its default."""
    if isinstance(value, bool):
        return str(value).lower()
    return "default" if value is None else str(value)


def _label(said: str) -> str:
    """For the axis of a figure, where there is no room for all digits."""
    try:
        return f"{float(said):.3g}"
    except ValueError:
        return said


def _written(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(value)
