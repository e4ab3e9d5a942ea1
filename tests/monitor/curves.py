"""Losses and gradient norms as a run gives them, with noise whose tails are heavier than normal."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """A run: warm-up and fast fall, a long slow fall, the decay of the learning rate at the end."""

    steps: int = 1000
    noise: float = 0.05  # of the loss, nats; of the logarithm of the gradient norm three times that
    seed: int = 0
    bump: float = 0.3  # by which the loss rises and falls again in warm-up, as a high learning rate does

    def __iter__(self) -> Iterator[tuple[float, float]]:
        """(loss, gradient norm) of each step."""
        generator = random.Random(self.seed)
        for step in range(self.steps):
            decay = max(0.0, step / self.steps - 0.8) / 0.2  # 0 to 1 in the last fifth
            loss = 2.0 + 3.5 * math.exp(-step / 25) + 2.0 * (step + 20) ** -0.3 - 0.25 * decay
            loss += self.bump * math.exp(-(((step - 60) / 20) ** 2))
            norm = math.log(0.4) + 2.5 * math.exp(-step / 30) + 0.5 * (step / self.steps) - 0.4 * decay
            yield loss + self.noise * heavy(generator), math.exp(norm + 3 * self.noise * heavy(generator))


def heavy(generator: random.Random) -> float:
    """Student's t with 6 degrees of freedom, scaled to a standard deviation of 1."""
    chi = generator.gammavariate(3, 2)
    return generator.gauss(0, 1) / math.sqrt(chi / 6) / math.sqrt(6 / 4)
