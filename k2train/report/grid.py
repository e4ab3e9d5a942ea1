"""Charts of values that were chosen, such as the settings of a sweep: evenly spaced and named, whatever they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from k2train.report.chart import BOTTOM, HEIGHT, LABEL, LEFT, RIGHT, TOP, WIDTH, Chart, Series, Tile, Values, line_chart


def named_lines(title: str, unit: str, names: Sequence[str], curves: Sequence[Series]) -> Chart | None:
    """Curves over named places; None if there is nothing to draw.

    Args:
        title: of the chart.
        unit: of the values.
        names: of the places.
        curves: their x count the places from 0.
    """
    chart = line_chart(title, unit, curves)
    if chart is None:
        return None
    first, last = chart.data["first"], chart.data["last"]
    assert isinstance(first, float | int)
    assert isinstance(last, float | int)
    width = (WIDTH - LEFT - RIGHT) / (last - first)
    every = -(-len(names) // 8)
    chart.x_ticks = [(LEFT + (k - first) * width, names[k]) for k in range(0, len(names), every)]
    chart.data["labels"] = list(names)
    return chart


def named_tiles(title: str, unit: str, columns: Sequence[str], rows: Sequence[tuple[str, Values]]) -> Chart | None:
    """A heat map of named rows and columns, with the smallest value marked; None if there is nothing to draw.

    Args:
        title: of the chart.
        unit: of the values.
        columns: their names.
        rows: name and a value for each column; NaN where there is none.
    """
    values = np.array([list(row) for _, row in rows], dtype=float)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    low, high = float(finite.min()), float(finite.max())
    width, height = (WIDTH - LEFT - RIGHT) / len(columns), (HEIGHT - TOP - BOTTOM) / len(rows)
    chart = Chart(title=title, unit=f"{unit}; the smallest, {low:.4f}, is outlined")
    for r, (name, row) in enumerate(rows):
        chart.tiles += [
            Tile(
                x=LEFT + c * width,
                y=TOP + r * height,
                width=width,
                height=height,
                shade=(value - low) / (high - low) if high > low else 0.5,
                title=f"{name}, {columns[c]}: {value:.4f}",
                best=value == low,
            )
            for c, value in enumerate(row)
            if math.isfinite(value)
        ]
    chart.tiles.sort(key=lambda tile: tile.best)  # drawn last, so that no neighbour covers its outline
    chart.y_ticks = [(TOP + (r + 0.5) * height, name[:LABEL]) for r, (name, _) in enumerate(rows)]
    every = -(-len(columns) // 8)
    chart.x_ticks = [(LEFT + (c + 0.5) * width, columns[c]) for c in range(0, len(columns), every)]
    return chart
