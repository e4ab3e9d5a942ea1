"""The runs of each size and number of tokens, and what their best settings are.

A cell's loss is the least mean over seeds that any of its settings has. Its best learning rate is read off finer: the
lowest point of the parabola, in log lr, through the least loss and its two neighbours; that of its best batch likewise.
A value at the edge of what was tried is none of these: the best lies beyond it, nobody knows how far.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from k2train.experiments.scaling.runs import ScalingRun, Size

DRAWS = 400
CONFIDENCE = 0.9


class Place(enum.Enum):
    """Where the best of the values is that were tried."""

    INSIDE = "inside"
    LOWEST = "the lowest tried"
    HIGHEST = "the highest tried"
    ALONE = "not varied"


@dataclass(frozen=True)
class Optimum:
    """Of a setting, in a cell.

    Attributes:
        tried: of the best run.
        place: among the values that were tried.
        value: the lowest point of the parabola; NaN if it is not inside.
        low: of its interval of 90 %; NaN if no two runs differ in the seed alone, 0 if the parabola may be none.
        high: likewise, infinity if it may be none.
    """

    tried: float
    place: Place
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """Runs of one size and number of tokens, by their best settings."""

    size: Size
    tokens: int
    loss: float  # mean over seeds
    seeds: int
    runs: int  # of all settings
    others: str  # settings of the best, besides the next two
    lr: Optimum
    batch: Optimum

    @property
    def point(self) -> dict[str, float]:
        """Where it is, by the variables of laws."""
        return point(self.size, self.tokens)


def point(size: Size, tokens: int) -> dict[str, float]:
    """N active parameters without embedding and head, D tokens, C operations."""
    return {"N": size.active, "D": tokens, "C": size.flops * tokens}


def cells(runs: Sequence[ScalingRun]) -> list[Cell]:
    """All cells, by size and tokens."""
    scatter = seed_scatter(runs)
    found = _by(runs, lambda run: (run.size.active, run.size.total, run.tokens))
    return [_cell(found[key], scatter) for key in sorted(found)]


def seed_scatter(runs: Sequence[ScalingRun]) -> float:
    """The standard deviation of log loss over seeds, of all cells; NaN if no two runs differ in the seed alone."""
    groups = [[math.log(run.loss) for run in same] for same in _by(runs, _settings).values() if len(same) > 1]
    if not groups:
        return math.nan
    return math.sqrt(statistics.fmean(statistics.variance(losses) for losses in groups))


def _cell(runs: Sequence[ScalingRun], scatter: float) -> Cell:
    same = min(_by(runs, _settings).values(), key=_mean)
    best = same[0]
    return Cell(
        size=best.size,
        tokens=best.tokens,
        loss=_mean(same),
        seeds=len(same),
        runs=len(runs),
        others=best.others,
        lr=_optimum(runs, lambda run: run.lr, best, scatter),
        batch=_optimum(runs, lambda run: run.batch, best, scatter),
    )


def _optimum(
    runs: Sequence[ScalingRun], setting: Callable[[ScalingRun], float], best: ScalingRun, scatter: float
) -> Optimum:
    """Of a setting; each value by the least mean loss that any other settings have with it."""
    least = {value: min(_by(own, _settings).values(), key=_mean) for value, own in sorted(_by(runs, setting).items())}
    values, at = list(least), list(least).index(setting(best))
    if not 0 < at < len(values) - 1:
        place = Place.ALONE if len(values) == 1 else Place.HIGHEST if at else Place.LOWEST
        return Optimum(values[at], place, *[math.nan] * 3)
    x = np.log(values[at - 1 : at + 2])
    around = [least[value] for value in values[at - 1 : at + 2]]
    y = np.log([_mean(same) for same in around])
    value = float(np.exp(_lowest_points(x, y[None])[0]))
    if math.isnan(scatter):
        return Optimum(values[at], Place.INSIDE, value, math.nan, math.nan)
    errors = scatter / np.sqrt([len(same) for same in around])
    drawn = _lowest_points(x, y + errors * np.random.default_rng(0).standard_normal((DRAWS, 3)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.exp(np.quantile(drawn, [tail, 1 - tail], method="nearest"))
    return Optimum(values[at], Place.INSIDE, value, float(low), float(high))


def _lowest_points(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of parabolas through three points, (F,) from (3,) and (F, 3); where there is none, infinitely far down."""
    left, right = (y[:, 1] - y[:, 0]) / (x[1] - x[0]), (y[:, 2] - y[:, 1]) / (x[2] - x[1])
    bend = (right - left) / (x[2] - x[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        lowest = (x[0] + x[1]) / 2 - left / (2 * bend)
    return np.where(bend > 0, lowest, np.where(left + right > 0, -np.inf, np.inf))


def _settings(run: ScalingRun) -> tuple[Any, ...]:
    """All but the seed."""
    return run.size, run.tokens, run.lr, run.batch, run.others


def _by(runs: Sequence[ScalingRun], key: Callable[[ScalingRun], Any]) -> dict[Any, list[ScalingRun]]:
    groups: dict[Any, list[ScalingRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def _mean(runs: Sequence[ScalingRun]) -> float:
    return statistics.fmean(run.loss for run in runs)
