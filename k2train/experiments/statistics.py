"""Means over seeds, with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean, and how far on either side the true one is to be sought."""

    mean: float
    half: float  # NaN of a single value, and where one is not finite
    number: int  # of values

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} ± {self.half:.4f}"


def interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The interval of Student's t for the mean of values that are drawn independently from a normal distribution.

    Args:
        values: one or more.
        confidence: how often such an interval holds the true mean.
    """
    number = len(values)
    mean = statistics.fmean(values)
    if number < 2 or not all(map(math.isfinite, values)):
        return Interval(mean, math.nan, number)
    deviation = statistics.stdev(values)
    return Interval(mean, t_quantile(confidence, number - 1) * deviation / math.sqrt(number), number)


def t_quantile(confidence: float, degrees: int) -> float:
    """The t for which a variable of Student's distribution lies between -t and t with this probability.

    Args:
        confidence: the probability, below 1.
        degrees: of freedom.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # bisection down to the last bits
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) tan(angle)); Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3-4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
