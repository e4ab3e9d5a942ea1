"""Laws of loss: a sum of powers over a floor, fitted to logarithms of losses, with draws that tell how sure it is.

    L(N, D) = E + A / N^a + B / D^b

is Hoffmann et al.'s parametric form (arXiv 2203.15556, section 3.3, approach 3): N parameters, D tokens, E the loss
that no model and no data go below. It is fitted as there, by the Huber loss of log L from a grid of starts. Besiroglu
et al. (arXiv 2404.10102) found that theirs stopped before the minimum, and that their intervals were too narrow: hence
second derivatives here, and intervals that tests hold against laws that are known. The threshold of the Huber loss is
ten times Hoffmann's: losses of small models differ by more than his 0.001 from seed to seed.

How sure a fit is, a parametric bootstrap tells: losses drawn anew around the fit, with the scatter that its residuals
have, and fitted again. The scatter is itself drawn from what so few residuals leave open, so that for a law that were
linear these would be Student's t intervals. It holds what seeds do, and what the form does not follow among the points;
runs drawn again from the few seeds of a sweep would hold but a part of the former.

Shapes: F fits at once, n points, K terms, P parameters: log A of all terms, log a of all, log E if there is a floor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

HUBER = 0.01  # of log loss, from where on residuals count linearly
DRAWS = 500
ITERATIONS = 40
STARTS = {"exponent": (0.1, 0.3, 0.8), "floor": (0.2, 0.6, 0.9)}  # the floor as a share of the least loss
EXPONENTS = (1e-3, 4.0)  # between which they are sought
LEAST_FLOOR = 1e-3  # as a share of the least loss: as good as none


@dataclass(frozen=True)
class Form:
    """Which law is fitted: of ``N``, ``D``, ``C`` or several of them, with a floor or down to zero."""

    over: tuple[str, ...]
    floor: bool

    @property
    def parameters(self) -> int:
        """How many are fitted."""
        return 2 * len(self.over) + self.floor

    def __str__(self) -> str:
        names = zip("AB", self.over, "ab", strict=False)
        powers = [f"{factor} / {variable}^{exponent}" for factor, variable, exponent in names]
        return f"L({', '.join(self.over)}) = {' + '.join([*(['E'] if self.floor else []), *powers])}"


@dataclass(frozen=True)
class Law:
    """A form with numbers.

    Attributes:
        form: what was fitted.
        scale: by which each variable is divided, (K,).
        best: parameters, (P,).
        draws: parameters of the bootstrap, (F, P).
        scatter: of log loss around each of them, (F,).
        residuals: of log loss, in the order of the points, (n,).
    """

    form: Form
    scale: Array
    best: Array
    draws: Array
    scatter: Array
    residuals: Array

    def loss(self, points: Sequence[Mapping[str, float]]) -> Array:
        """What the law says, (n,)."""
        logs, _ = _evaluate(self.best[None], self._places(points), self.form)
        return np.asarray(np.exp(logs[0]))

    def interval(self, points: Sequence[Mapping[str, float]], *, confidence: float) -> tuple[Array, Array]:
        """The lower and upper ends, (n,) and (n,), between which losses are that are measured there.

        Args:
            points: with a value for each variable.
            confidence: that all of them are, below 1. By Bonferroni each of n is with 1 - (1 - confidence) / n.
        """
        values, _ = _evaluate(self.draws, self._places(points), self.form)
        noise = np.random.default_rng(1).standard_normal(values.shape)
        tail = (1 - confidence) / len(points) / 2
        low, high = np.quantile(values + self.scatter[:, None] * noise, [tail, 1 - tail], axis=0)
        return np.exp(low), np.exp(high)

    @cached_property
    def constants(self) -> dict[str, float]:
        """E, A, a, B, b by name, of those that the form has."""
        return {name: float(values[0]) for name, values in self._named(self.best[None]).items()}

    def spread(self, *, confidence: float) -> dict[str, tuple[float, float]]:
        """Intervals of the constants."""
        tail = (1 - confidence) / 2
        named = self._named(self.draws)
        ends = {name: np.quantile(values, [tail, 1 - tail]) for name, values in named.items()}
        return {name: (float(low), float(high)) for name, (low, high) in ends.items()}

    def _named(self, parameters: Array) -> dict[str, Array]:
        terms, found = len(self.form.over), {}
        if self.form.floor:
            found["E"] = np.exp(parameters[:, -1])
        for k, (factor, exponent) in enumerate(zip("AB"[:terms], "ab"[:terms], strict=True)):
            power = np.exp(parameters[:, terms + k])
            found[factor] = np.exp(parameters[:, k] + power * math.log(self.scale[k]))
            found[exponent] = power
        return found

    def _places(self, points: Sequence[Mapping[str, float]]) -> Array:
        return np.log(np.array([[point[name] for name in self.form.over] for point in points]) / self.scale)


def fit(form: Form, points: Sequence[Mapping[str, float]], losses: Sequence[float], *, draws: int = DRAWS) -> Law:
    """Fits a law.

    Args:
        form: with fewer parameters than there are points.
        points: with a value for each variable of the form.
        losses: at them.
        draws: of the bootstrap.
    """
    left = len(points) - form.parameters
    assert left > 0, f"{len(points)} points for {form.parameters} parameters"
    raw = np.array([[point[name] for name in form.over] for point in points])
    scale = np.exp(np.log(raw).mean(axis=0))
    x, y = np.log(raw / scale), np.log(np.asarray(losses, dtype=float))
    starts = _starts(form, y)
    found, costs = _minimise(starts, x, np.tile(y, (len(starts), 1)), form)
    best = found[costs.argmin()]
    fitted, _ = _evaluate(best[None], x, form)
    residuals = y - fitted[0]
    random = np.random.default_rng(0)
    scatter = np.sqrt(np.sum(residuals**2) / random.chisquare(left, draws))
    again = fitted + scatter[:, None] * random.standard_normal((draws, len(y)))
    samples, _ = _minimise(np.tile(best, (draws, 1)), x, again, form)
    return Law(form, scale, best, samples, scatter, residuals)


def _starts(form: Form, y: Array) -> Array:
    """All combinations of exponents and floors, with terms of one size in the middle of the points."""
    floors = STARTS["floor"] if form.floor else (0.0,)
    found = []
    for *exponents, share in itertools.product(*[STARTS["exponent"]] * len(form.over), floors):
        floor = share * math.exp(y.min())
        term = math.log((math.exp(y.mean()) - floor) / len(form.over))
        found.append([*[term] * len(form.over), *map(math.log, exponents), *([math.log(floor)] if form.floor else [])])
    return np.array(found)


def _evaluate(parameters: Array, x: Array, form: Form) -> tuple[Array, Array]:
    """log L, (F, n), and its derivatives, (F, n, P)."""
    terms = len(form.over)
    factors, exponents = parameters[:, None, :terms], np.exp(parameters[:, None, terms : 2 * terms])
    logs = factors - exponents * x  # (F, n, K)
    if form.floor:
        logs = np.concatenate([logs, np.broadcast_to(parameters[:, None, -1:], (*logs.shape[:2], 1))], axis=2)
    largest = logs.max(axis=2, keepdims=True)
    shares = np.exp(logs - largest)
    total = shares.sum(axis=2, keepdims=True)
    shares /= total
    slopes = [shares[..., :terms], -shares[..., :terms] * exponents * x, shares[..., terms:]]
    return (largest + np.log(total))[..., 0], np.concatenate(slopes, axis=2)


def _minimise(start: Array, x: Array, y: Array, form: Form) -> tuple[Array, Array]:
    """The sum of Huber losses made small by Levenberg and Marquardt's method, of all fits at once.

    scipy's minimisers take one fit at a time, and would take minutes for the draws.

    Args:
        start: (F, P).
        x: (n, K).
        y: log losses, (F, n).
        form: of the law.

    Returns:
        Parameters (F, P), and what the sum is (F,).
    """
    lowest, highest = _bounds(form, y)
    found, damping = start, np.full(len(start), 1e-2)
    values, slopes = _evaluate(found, x, form)
    costs = _huber(values - y)
    for _ in range(ITERATIONS):
        residuals = values - y
        weights = 1 / np.maximum(1, np.abs(residuals) / HUBER)
        weighted = np.swapaxes(slopes * weights[..., None], 1, 2)  # (F, P, n)
        curvature = weighted @ slopes  # (F, P, P)
        diagonal = np.einsum("fpp->fp", curvature)
        diagonal += damping[:, None] * diagonal + 1e-10
        step = np.linalg.solve(curvature, weighted @ residuals[..., None])[..., 0]
        tried = np.clip(found - np.clip(step, -1, 1), lowest, highest)
        tried_values, tried_slopes = _evaluate(tried, x, form)
        tried_costs = _huber(tried_values - y)
        better = tried_costs < costs
        found = np.where(better[:, None], tried, found)
        values = np.where(better[:, None], tried_values, values)
        slopes = np.where(better[:, None, None], tried_slopes, slopes)
        costs = np.where(better, tried_costs, costs)
        damping = np.clip(np.where(better, damping / 5, damping * 5), 1e-9, 1e6)
    return found, costs


def _bounds(form: Form, y: Array) -> tuple[Array, Array]:
    """Of each fit's parameters, (F, P): exponents within ``EXPONENTS``, a floor that is not as good as none."""
    terms = len(form.over)
    lowest = np.full((len(y), form.parameters), -np.inf)
    highest = np.full_like(lowest, np.inf)
    lowest[:, terms : 2 * terms], highest[:, terms : 2 * terms] = map(math.log, EXPONENTS)
    if form.floor:
        lowest[:, -1] = y.min(axis=1) + math.log(LEAST_FLOOR)
    return lowest, highest


def _huber(residuals: Array) -> Array:
    """The sum over points, (F,)."""
    size = np.abs(residuals)
    each: Array = np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2))
    return np.asarray(each.sum(axis=1))
