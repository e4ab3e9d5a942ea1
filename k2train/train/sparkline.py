"""The course of a number over a whole run, in one line of text."""

from __future__ import annotations

import math
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
KEPT = 512  # values in memory, at most


class Sparkline:
    """Means of equally many values each, so that a run of any length takes bounded memory."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._each = 1  # values in a mean
        self._sum, self._number = 0.0, 0  # of the one that is not full

    def add(self, value: float | None) -> None:
        """The next value; one that is not finite is passed over."""
        if value is None or not math.isfinite(value):
            return
        self._sum, self._number = self._sum + value, self._number + 1
        if self._number == self._each:
            self._means.append(self._sum / self._each)
            self._sum, self._number = 0.0, 0
        if len(self._means) == KEPT:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._each *= 2

    def draw(self, width: int) -> str:
        """At most so many blocks. The highest tenth is all full height: how a run begins would flatten the rest."""
        values = [*self._means, *([self._sum / self._number] if self._number else [])]
        parts = min(width, len(values))
        if parts < 1:
            return ""
        cuts = [len(values) * k // parts for k in range(parts + 1)]
        means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
        low, high = min(means), sorted(means)[(len(means) - 1) * 9 // 10]
        span = (high - low) or 1.0
        return "".join(BLOCKS[min(len(BLOCKS) - 1, int((v - low) / span * (len(BLOCKS) - 1) + 0.5))] for v in means)
