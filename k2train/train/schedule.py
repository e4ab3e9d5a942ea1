"""The learning rate within a phase: warm-up, stable, decay (WSD), as K2 was trained (arXiv 2507.20534, section 2.5).

Cosine and linear schedules are decays over the whole length, a constant one has none. All of it is a function of the
tokens that the run has seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Decay:
    """From one share of the peak learning rate to another, over the tokens from ``start`` to ``stop`` of the run."""

    start: int
    stop: int
    shape: str  # linear | cosine
    before: float
    after: float

    def ratio(self, tokens: int) -> float:
        """The share of the peak when a step has brought the run to so many tokens."""
        into = tokens - self.start
        if into <= 0:
            return self.before
        share = into / (self.stop - self.start)
        kept = 1 - share if self.shape == "linear" else (1 + math.cos(math.pi * share)) / 2
        return self.after + (self.before - self.after) * kept


def warmup(tokens: int, *, length: int) -> float:
    """What the learning rate is multiplied with at the start of a run: it rises linearly over ``length`` tokens.

    As ``tokens`` are those seen after the step, the first step is not lost on a rate of 0.
    """
    return min(1.0, tokens / length) if length else 1.0
