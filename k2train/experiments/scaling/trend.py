"""Best settings over sizes and tokens: powers fitted to them, lr = c N^p D^q, with Student's t for how sure they are.

DeepSeek LLM (arXiv 2401.02954, section 3.1) has them over the operations for AdamW: 0.3118 C^-0.125, and batches of
0.2920 C^0.3271 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from k2train.experiments.scaling.cells import CONFIDENCE
from k2train.experiments.statistics import t_quantile

LEVELS = 3


@dataclass(frozen=True)
class Trend:
    """A product of powers, fitted by least squares of logarithms.

    Attributes:
        over: its variables, (K,).
        centre: means of their logarithms, (K,).
        constants: the mean of the logarithm, and an exponent for each variable, (1 + K,).
        covariance: of these, (1 + K, 1 + K).
        scatter: of logarithms around it.
        left: points beyond the constants.
    """

    over: tuple[str, ...]
    centre: np.ndarray
    constants: np.ndarray
    covariance: np.ndarray
    scatter: float
    left: int

    @property
    def exponents(self) -> dict[str, tuple[float, float]]:
        """Of each variable the exponent, and how far its interval of 90 % reaches."""
        reach = t_quantile(CONFIDENCE, self.left) * np.sqrt(np.diag(self.covariance))
        pairs = zip(self.constants[1:], reach[1:], strict=True)
        return {name: (float(value), float(half)) for name, (value, half) in zip(self.over, pairs, strict=True)}

    @property
    def factor(self) -> float:
        """In front of the powers."""
        return math.exp(self.constants[0] - float(self.constants[1:] @ self.centre))

    def at(self, place: Mapping[str, float]) -> tuple[float, float, float]:
        """The value there, and the interval of 90 % in which one is that is measured there."""
        row = np.array([1.0, *(math.log(place[name]) for name in self.over)]) - [0.0, *self.centre]
        middle = float(row @ self.constants)
        reach = t_quantile(CONFIDENCE, self.left) * math.sqrt(float(row @ self.covariance @ row) + self.scatter**2)
        return math.exp(middle), math.exp(middle - reach), math.exp(middle + reach)


def trend(over: Sequence[str], places: Sequence[Mapping[str, float]], values: Sequence[float]) -> Trend | None:
    """The powers through values; None if there are too few, or fewer than ``LEVELS`` of the first variable.

    Args:
        over: which variables.
        places: where the values are.
        values: positive.
    """
    left = len(values) - 1 - len(over)
    if left < 1 or len({place[over[0]] for place in places}) < LEVELS:
        return None
    logs = np.log([[place[name] for name in over] for place in places])
    centre = logs.mean(axis=0)
    rows = np.column_stack([np.ones(len(logs)), logs - centre])
    if np.linalg.matrix_rank(rows) < rows.shape[1]:
        return None
    y = np.log(values)
    constants = np.linalg.lstsq(rows, y, rcond=None)[0]
    scatter = math.sqrt(float(np.sum((y - rows @ constants) ** 2)) / left)
    return Trend(tuple(over), centre, constants, scatter**2 * np.linalg.inv(rows.T @ rows), scatter, left)
