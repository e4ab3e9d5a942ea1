"""Charts as SVG paths: where lines and tiles lie, what stands on the axes. Pure functions; markup is in page.html.

A curve of many values is cut into as many buckets as a screen has columns, and of each the smallest and the largest
value are kept, so that a spike of a single step is drawn whatever the length of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from k2train.units import count

WIDTH, HEIGHT = 400.0, 230.0  # of the SVG, in its own units
LEFT, RIGHT, TOP, BOTTOM = 46.0, 18.0, 16.0, 24.0  # margins
BUCKETS = 300  # of a curve
MANY = 100  # values from which on a curve is drawn pale behind its running mean
ROWS = 64  # of a heat map, at most
LABEL = 7  # characters of a row's name for which there is room

Values = Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve.

    Attributes:
        name: in the legend.
        x: steps or tokens, ascending.
        y: NaN is a gap.
        colour: number of the run, from 0.
        dots: a few values, each marked.
        smooth: draw the running mean where there are many.
        dash: number of the line's style; 0 is solid.
        spread: how far around each value its interval reaches; empty: there are none.
    """

    name: str
    x: Values
    y: Values
    colour: int = 0
    dots: bool = False
    smooth: bool = False
    dash: int = 0
    spread: Values = ()


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line for comparison."""

    name: str
    y: float


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A part of a heat map; ``shade`` from 0 to 1."""

    x: float
    y: float
    width: float
    height: float
    shade: float
    title: str
    best: bool = False


@dataclass(kw_only=True)
class Chart:
    """All that the template draws; positions are in the SVG's units."""

    title: str
    unit: str
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    lines: list[dict[str, object]] = field(default_factory=list)
    levels: list[dict[str, object]] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    data: dict[str, object] = field(default_factory=dict)  # for reading values off under the pointer


def line_chart(
    title: str,
    unit: str,
    curves: Sequence[Series],
    *,
    levels: Sequence[Level] = (),
    log: bool = False,
    zero: bool = False,
) -> Chart | None:
    """Curves over one axis; None if there is nothing to draw.

    Args:
        title: of the chart.
        unit: of the values.
        curves: to draw.
        levels: horizontal lines; they widen the axis unless they lie far off.
        log: a logarithmic axis, where the values are positive and span a factor of ten.
        zero: the axis begins at zero.
    """
    seen = [s for s in curves if np.isfinite(np.asarray(s.y, dtype=float)).any()]
    if not seen:
        return None
    values = np.concatenate([np.asarray(end, dtype=float) for s in seen for end in _ends(s)])
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    for level in levels:
        if low - 2 * (high - low) <= level.y <= high + 2 * (high - low):
            low, high = min(low, level.y), max(high, level.y)
    log = log and low > 0 and high > 10 * low
    if zero:
        low = min(low, 0.0)
    if high - low < 1e-12 * max(abs(high), 1.0):
        low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
    first, last = min(float(s.x[0]) for s in seen), max(float(s.x[-1]) for s in seen)
    if first == last:
        first, last = first - 1, last + 1
    chart = Chart(title=title, unit=unit)

    def across(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        a, b, c = (math.log10(v) for v in (y, low, high)) if log else (y, low, high)
        return HEIGHT - BOTTOM - (a - b) / (c - b) * (HEIGHT - TOP - BOTTOM)

    chart.x_ticks = [(across(x), count(x)) for x in ticks(first, last, whole=True)]
    chart.y_ticks = [(down(y), _short(y)) for y in (log_ticks(low, high) if log else ticks(low, high))]
    chart.levels = [
        {"name": f"{level.name}: {level.y:.4g}", "y": down(level.y)} for level in levels if low <= level.y <= high
    ]
    for curve in seen:
        x, y = thinned(curve.x, curve.y)
        many = curve.smooth and len(curve.x) >= MANY
        shown = {"name": curve.name, "colour": curve.colour % 8, "dash": curve.dash % 4, "pale": many}
        dots = [(across(a), down(b)) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
        marked = dots if curve.dots or len(dots) < 3 else []
        chart.lines.append(shown | {"path": path(x, y, across, down), "dots": marked})
        if curve.spread:
            whiskers = [(across(a), down(b), down(c)) for a, b, c in zip(curve.x, *_ends(curve), strict=True) if b < c]
            bars = "".join(f"M{a:.1f} {b:.1f}V{c:.1f}" for a, b, c in whiskers)
            chart.lines.append(shown | {"name": "", "path": bars, "dots": []})
        if many:
            smooth = running_mean(curve.y, window=max(3, len(curve.y) // 40))
            x_, y_ = thinned(curve.x, smooth)
            chart.lines.append(shown | {"pale": False, "name": "", "path": path(x_, y_, across, down), "dots": []})
    chart.data = {
        "first": first,
        "last": last,
        "series": [
            {"name": s.name, "x": x, "y": [None if math.isnan(v) else float(f"{v:.5g}") for v in y]}
            for s in seen
            for x, y in [thinned(s.x, s.y)]
        ],
    }
    return chart


def heat_map(title: str, unit: str, x: Values, rows: Sequence[tuple[str, Values]]) -> Chart | None:
    """Rows of tiles, one for each head, expert or layer, over steps; None if there is nothing to draw.

    Args:
        title: of the chart.
        unit: of the values.
        x: steps or tokens, ascending.
        rows: names and values; of more than 64 the largest of neighbours is drawn. So it is of steps.
    """
    if not rows:
        return None
    values = np.array([list(row) for _, row in rows], dtype=float)
    if not np.isfinite(values).any():
        return None
    names = [name for name, _ in rows]
    row_starts = _starts(len(names), ROWS)
    column_starts = _starts(len(x), 50)
    filled = np.where(np.isfinite(values), values, -np.inf)
    reduced = np.maximum.reduceat(np.maximum.reduceat(filled, row_starts, axis=0), column_starts, axis=1)
    finite = reduced[np.isfinite(reduced)]
    low, high = float(finite.min()), float(finite.max())
    width = (WIDTH - LEFT - RIGHT) / reduced.shape[1]
    height = (HEIGHT - TOP - BOTTOM) / reduced.shape[0]
    chart = Chart(title=title, unit=f"{unit}, {_short(low)} to {_short(high)}")
    for r, c in zip(*np.nonzero(np.isfinite(reduced)), strict=True):
        value = float(reduced[r, c])
        chart.tiles.append(
            Tile(
                x=LEFT + c * width,
                y=TOP + r * height,
                width=width,
                height=height,
                shade=(value - low) / (high - low) if high > low else 0.5,
                title=f"{names[row_starts[r]]} at {count(float(x[column_starts[c]]))}: {value:.4g}",
            )
        )
    every = -(-reduced.shape[0] // 8)
    labelled = range(0, reduced.shape[0], every)
    chart.y_ticks = [(TOP + (r + 0.5) * height, names[row_starts[r]][:LABEL]) for r in labelled]
    chart.x_ticks = [
        (LEFT + (c + 0.5) * width, count(float(x[column_starts[c]])))
        for c in sorted({0, reduced.shape[1] // 2, reduced.shape[1] - 1})
    ]
    return chart


def _ends(curve: Series) -> tuple[Values, Values]:
    """The lower and the upper ends of a curve's intervals; its values where it has none."""
    spread = np.nan_to_num(np.asarray(curve.spread or np.zeros(len(curve.y)), dtype=float))
    y = np.asarray(curve.y, dtype=float)
    return (y - spread).tolist(), (y + spread).tolist()


def _starts(number: int, most: int) -> list[int]:
    """Beginnings of at most so many parts of equal length."""
    return list(range(0, number, max(1, -(-number // most))))


def thinned(x: Values, y: Values) -> tuple[list[float], list[float]]:
    """At most twice ``BUCKETS`` points: of each bucket the smallest and the largest; a gap stays one."""
    if len(x) <= 2 * BUCKETS:
        return [_plain(v) for v in x], [float(v) for v in y]
    values = np.asarray(y, dtype=float)
    kept: list[int] = []
    for part in np.array_split(np.arange(len(values)), BUCKETS):
        finite = part[np.isfinite(values[part])]
        if len(finite):
            kept += sorted({int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])})
        else:
            kept.append(int(part[0]))
    kept = sorted({0, *kept, len(values) - 1})
    return [_plain(x[k]) for k in kept], [float(values[k]) for k in kept]


def running_mean(values: Values, *, window: int) -> list[float]:
    """The mean over ``window`` values around each, over fewer at the ends, without those that are NaN."""
    y = np.asarray(values, dtype=float)
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centre = np.arange(len(y))
    # At the start no further ahead than back: a curve that falls steeply would be bent.
    reach = np.minimum(window // 2, centre)
    begin, end = centre - reach, np.minimum(centre + reach + 1, len(y))
    number = counts[end] - counts[begin]
    means = (sums[end] - sums[begin]) / np.maximum(number, 1)
    return [float(mean) if n else math.nan for mean, n in zip(means, number, strict=True)]


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round values within an interval."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= max(f for f in (1, 2, 5, 10) if f * step <= (high - low) / 3 or f == 1)
    if whole:
        step = max(step, 1.0)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within an interval, and halves between few of them."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = -(-len(exponents) // 5)
    factors = (1, 3) if len(exponents) <= 3 else (1,)
    return [f * 10.0**e for e in exponents if e % every == 0 for f in factors if low <= f * 10.0**e <= high]


def path(x: Values, y: Values, across: object, down: object) -> str:
    """The points as an SVG path, lifted at gaps."""
    assert callable(across)
    assert callable(down)
    parts, lifted = [], True
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            parts.append(f"{'M' if lifted else 'L'}{across(a):.1f} {down(b):.1f}")
        lifted = not math.isfinite(b)
    return "".join(parts)


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _short(value: float) -> str:
    """At most six characters."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e15):
        return f"{value:.1e}".replace("e-0", "e-")
    return count(value) if abs(value) >= 1000 else f"{value:.3g}"
