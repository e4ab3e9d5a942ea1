"""A picture of a run, from its metrics.jsonl."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from k2train.paths import atomic_write
from k2train.units import count

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#6b7280"
STYLES = ("--", ":", "-.")  # of lines for comparison
Record = Mapping[str, Any]


def draw_curves(
    metrics: Path, png: Path, *, tau: float | None = None, compression: Mapping[str, float] | None = None
) -> None:
    """Draws the metrics of a run; the name of their folder is the title.

    Args:
        metrics: metrics.jsonl, as long as it is so far.
        png: the picture, written whole or not at all.
        tau: QK-Clip's threshold, drawn among the attention logits.
        compression: bits per byte of compressors by their name, drawn among those of the model.

    Raises:
        OSError: the metrics cannot be read or the picture cannot be written.
    """
    steps, validations = read_records(metrics)
    figure = Figure(figsize=(16, 7.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(metrics.resolve().parent.name, fontsize=15, fontweight="bold", parse_math=False)
    loss, bits, lr, norm, logit, clipped, speed, balance = figure.subplots(2, 4).flat

    _curve(loss, steps, "loss", label="training")
    _points(loss, validations, "loss")
    _finish(loss, "loss", "nats a token")
    _curve(bits, steps, "bits_per_byte", label="training")
    _points(bits, validations, "bits_per_byte")
    for (name, size), style in zip((compression or {}).items(), cycle(STYLES), strict=False):
        _level(bits, size, name, style=style)
    _finish(bits, "bits per byte", "bits")
    _curve(lr, steps, "lr", smooth=False)
    _finish(lr, "learning rate", "of the schedule")
    lr.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    _curve(norm, steps, "grad_norm")
    _finish(norm, "gradient norm", "before clipping", log=True)
    _curve(logit, steps, "max_logit")
    if tau is not None:
        _level(logit, tau, "tau", style=STYLES[0])
    _finish(logit, "largest attention logit", "of all heads")
    _curve(clipped, steps, "clipped_heads")
    _finish(clipped, "heads clipped by QK-Clip", "heads")
    clipped.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    clipped.set_ylim(bottom=0)
    _curve(speed, steps, "tokens_per_second")
    _finish(speed, "speed", "tokens a second")
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    speed.set_ylim(bottom=0)
    _curve(balance, steps, "balance_max")
    _finish(balance, "expert balance", "largest load / mean load")

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(png, buffer.getvalue())


def read_records(path: Path) -> tuple[list[Record], list[Record]]:
    """The records of steps and of validations, each in order of steps.

    A run that was killed may have torn its last line, and one that was resumed repeats steps: what it writes of a step
    replaces what was there of that and of later ones.
    """
    steps: list[Record] = []
    validations: list[Record] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        is_validation = "validation_loss" in record
        for records in [validations] if is_validation else [steps, validations]:
            while records and records[-1]["step"] >= record["step"]:
                records.pop()
        (validations if is_validation else steps).append(record)
    return steps, validations


def running_mean(values: Sequence[float], *, window: int) -> list[float]:
    """The mean over ``window`` values around each, over fewer at the ends, without those that are NaN."""
    half, means = window // 2, []
    for centre in range(len(values)):
        reach = min(half, centre)  # at the start no further ahead than back: a curve that falls steeply would be bent
        near = [v for v in values[centre - reach : centre + reach + 1] if not math.isnan(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values; what is absent or not finite is a gap in the curve."""
    values = [record.get(key) for record in records]
    return [record["step"] for record in records], [
        float(v) if isinstance(v, int | float) and math.isfinite(v) else math.nan for v in values
    ]


def _curve(axes: Axes, records: Sequence[Record], key: str, *, smooth: bool = True, label: str | None = None) -> None:
    """A line; where there are many values, pale behind their running mean. A single value is a dot."""
    x, y = _series(records, key)
    many = smooth and len(x) >= 100
    marker = "o" if len(x) < 3 else None
    if many:
        axes.plot(x, y, color=BLUE, linewidth=0.8, alpha=0.3)
        y = running_mean(y, window=max(3, len(x) // 40))
    axes.plot(x, y, color=BLUE, linewidth=1.6, marker=marker, markersize=4, label=label)


def _points(axes: Axes, records: Sequence[Record], key: str) -> None:
    """A line with dots on held-out text, and where there are several sets a thin one for each."""
    if records:
        x, y = _series(records, f"validation_{key}")
        axes.plot(x, y, color=ORANGE, linewidth=1, marker="o", markersize=4, label="held out")
    sets = dict.fromkeys(name for record in records for name in record.get("sets", {}))
    for name, style in zip(sets, cycle(STYLES)):
        of_set = [{"step": record["step"], **record.get("sets", {}).get(name, {})} for record in records]
        axes.plot(*_series(of_set, key), color=ORANGE, linewidth=0.8, linestyle=style, marker=".", label=name)


def _level(axes: Axes, value: float, name: str, *, style: str) -> None:
    """A horizontal line for comparison."""
    axes.axhline(value, color=GREY, linewidth=1, linestyle=style, label=f"{name}: {value:.4g}")


def _finish(axes: Axes, title: str, unit: str, *, log: bool = False) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    drawn = values[np.isfinite(values)]
    if not len(drawn):
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color=GREY)
    elif log and drawn.min() > 0 and drawn.max() > 10 * drawn.min():
        axes.set_yscale("log")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False)
