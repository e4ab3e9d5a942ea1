"""What is out of the ordinary: a pure function of a signal's history.

A value is held against what a window of earlier ones lets expect, in robust standard deviations of the noise: the
median absolute deviation of the differences between neighbours, times 1.4826 as for a normal distribution, over the
root of two, as a difference has the noise of both; and at least a floor. What is expected is an interval. One end is
the level, the median of the newest third of the window; the other is where the trend leads, by Tukey's resistant line
(Exploratory Data Analysis, 1977, chapter 5) through the medians of the first and the last third. So a loss that falls
fast and then levels off, as after warm-up, does not seem to rise above its trend, and one that falls faster than its
level, as in the decay, does not seem to be torn down.

Values that were flagged stay out of the window, so that a spike hides no second one. Only if PATIENCE values in a row
are flagged was it no spike: the level has changed, and the window begins anew with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

LEAST = 16  # values before anything is said
PATIENCE = 8
NORMAL = 1.4826  # standard deviations to a median absolute deviation


@dataclass(frozen=True)
class Rule:
    """When a value of a signal is flagged."""

    deviations: float  # beyond this many
    floor: float  # of a standard deviation, in the unit of the signal
    window: int  # values
    falls: bool = False  # whether a fall is flagged as a rise is
    least: float = 0.0  # and only if it is this far from what was expected, in the unit of the signal


@dataclass(frozen=True)
class Series:
    """The history of a signal, as far as it matters."""

    values: tuple[float, ...] = ()  # that were not flagged, the newest last
    flagged: tuple[float, ...] = ()  # since the last that was not

    def state_dict(self) -> dict[str, Any]:
        """Fit for JSON, exactly."""
        return {"values": list(self.values), "flagged": list(self.flagged)}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Series:
        """The inverse."""
        return cls(tuple(map(float, state["values"])), tuple(map(float, state["flagged"])))


@dataclass(frozen=True)
class Finding:
    """A value that is out of the ordinary."""

    signal: str
    value: float
    expected: float  # the nearer end of the interval; NaN where nothing can be: the value is not finite
    deviations: float  # from there, negative for a fall; infinite where the value is not finite


def observe(series: Series, value: float, rule: Rule, *, signal: str) -> tuple[Finding | None, bool, Series]:
    """How far the next value is out of the ordinary, whether it is flagged, and the history with it.

    Of the first ``LEAST`` values nothing is said.

    Args:
        series: before it.
        value: finite.
        rule: of the signal.
        signal: its name, for the finding.
    """
    finding, flags = None, False
    if len(series.values) >= LEAST:
        finding = Finding(signal, value, *surprise(series.values, value, floor=rule.floor))
        far = abs(finding.deviations) > rule.deviations and abs(value - finding.expected) > rule.least
        flags = far and (finding.deviations > 0 or rule.falls)
    if not flags:
        return finding, False, Series((*series.values, value)[-rule.window :])
    flagged = (*series.flagged, value)
    return finding, True, Series(flagged) if len(flagged) == PATIENCE else Series(series.values, flagged)


def surprise(values: Sequence[float], value: float, *, floor: float) -> tuple[float, float]:
    """What was to be expected that is nearest to a value, and the value's distance from it in standard deviations.

    Args:
        values: that came before it, 3 or more.
        value: the next.
        floor: of the standard deviation.
    """
    differences = [after - before for before, after in pairwise(values)]
    centre = median(differences)
    # A bend of the curve, which would widen the spread around a line, hardly enters the differences.
    deviation = max(NORMAL * median(abs(d - centre) for d in differences) / math.sqrt(2), floor)
    slope, offset = resistant_line(values)
    trend, level = offset + slope * len(values), median(values[-(len(values) // 3) :])
    expected = min(max(value, min(trend, level)), max(trend, level))
    return expected, (value - expected) / deviation


def resistant_line(values: Sequence[float]) -> tuple[float, float]:
    """Slope, and height at the first value, of the line through the medians of the outer thirds.

    Args:
        values: 3 or more, evenly spaced.
    """
    third = len(values) // 3
    first, last = median(values[:third]), median(values[-third:])
    slope = (last - first) / (len(values) - third)
    return slope, first - slope * (third - 1) / 2
