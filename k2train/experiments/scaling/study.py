"""What a sweep over sizes says: its laws, whether they would have foretold its largest size, and what they foretell.

The test of the laws is always made: the cells of the largest size are left out, all is fitted to the others, and the
measured losses are held against intervals that were to hold all of them in 90 % of such cases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from k2train.config import RunConfig
from k2train.experiments.reproduction import Outcome
from k2train.experiments.scaling.cells import CONFIDENCE, Cell, Place, cells, point
from k2train.experiments.scaling.law import Form, Law, fit
from k2train.experiments.scaling.runs import ScalingError, ScalingRun, Size, size_of, text_of
from k2train.experiments.scaling.trend import Trend, trend
from k2train.train.phases import build_plan

SIZES = 3  # of models, at least
AWAY = 1.5  # times more or fewer tokens than the sweep has there


@dataclass(frozen=True)
class Laws:
    """What is fitted to cells; None where too few have what it is fitted to, as a best batch inside what was tried."""

    cells: Sequence[Cell]
    why: str  # the loss has its form
    loss: Law
    compute: Law | None  # of the loss over operations, through the cells that no other reaches with fewer
    lr: Trend | None
    batch: Trend | None


@dataclass(frozen=True)
class Forecast:
    """Of a loss, within an interval of 90 %, and of the settings."""

    point: dict[str, float]
    loss: float
    low: float
    high: float
    lr: tuple[float, float, float] | None  # with its interval
    batch: tuple[float, float, float] | None  # tokens a step


@dataclass(frozen=True)
class HeldOut:
    """A cell of the largest size, and what the laws of the others say of it."""

    cell: Cell
    forecast: Forecast
    before: float | None  # loss of the largest size among the others with as many tokens

    @property
    def within(self) -> bool:
        """Whether the loss is as foretold."""
        return self.forecast.low <= self.cell.loss <= self.forecast.high

    @property
    def vague(self) -> bool:
        """Whether it would be as foretold, too, if the size made no difference."""
        return self.before is not None and self.forecast.low <= self.before <= self.forecast.high


@dataclass(frozen=True)
class Backtest:
    """Laws without the largest size, and whether they would have foretold it."""

    laws: Laws
    held_out: Sequence[HeldOut]

    @property
    def outcome(self) -> Outcome:
        """Not shown if losses that are off may be so because their best learning rate was not among those tried."""
        if all(held.within for held in self.held_out):
            return Outcome.HOLDS
        if any(not held.within and held.cell.lr.place is not Place.INSIDE for held in self.held_out):
            return Outcome.NOT_SHOWN
        return Outcome.DOES_NOT_HOLD


@dataclass(frozen=True)
class Study:
    """All of it; ``backtest`` is None where too few sizes are left, ``untested`` says why."""

    laws: Laws
    backtest: Backtest | None
    untested: str
    forecast: Forecast | None


def study(runs: Sequence[ScalingRun], target: RunConfig | None = None) -> Study:
    """Fits, tests and foretells.

    Args:
        runs: of all sizes.
        target: a run whose loss and settings are to be foretold.

    Raises:
        ScalingError: there are too few sizes, or the target is none that the sweep can say anything of.
    """
    found = cells(runs)
    laws = fit_laws(found)
    largest = max(cell.size.active for cell in found)
    others = [cell for cell in found if cell.size.active < largest]
    backtest, untested = None, ""
    try:
        rest = fit_laws(others)
        held = [cell for cell in found if cell.size.active == largest]
        pairs = zip(held, _forecasts(rest, [cell.point for cell in held]), strict=True)
        backtest = Backtest(rest, [HeldOut(cell, said, _before(others, cell.tokens)) for cell, said in pairs])
    except ScalingError as error:
        untested = str(error)
    forecasts = [] if target is None else _forecasts(laws, [_place(runs, laws, target)])
    return Study(laws, backtest, untested, next(iter(forecasts), None))


def fit_laws(found: Sequence[Cell]) -> Laws:
    """The laws of cells.

    Raises:
        ScalingError: there are too few.
    """
    form, why = choose_form(found)
    points, losses = [cell.point for cell in found], [cell.loss for cell in found]
    frontier = _frontier(found)
    compute = None
    if len(frontier) >= SIZES:
        over_compute = Form(("C",), floor=len(frontier) > 4)
        compute = fit(over_compute, [cell.point for cell in frontier], [cell.loss for cell in frontier])
    lrs = [cell for cell in found if cell.lr.place is Place.INSIDE]
    batches = [cell for cell in found if cell.batch.place is Place.INSIDE]
    return Laws(
        cells=found,
        why=why,
        loss=fit(form, points, losses),
        compute=compute,
        lr=trend(form.over, [cell.point for cell in lrs], [cell.lr.value for cell in lrs]),
        batch=trend(form.over, [cell.point for cell in batches], [cell.batch.value for cell in batches]),
    )


def choose_form(found: Sequence[Cell]) -> tuple[Form, str]:
    """The fullest form that cells can tell the constants of, and why it is no fuller.

    Raises:
        ScalingError: they can tell of none.
    """
    sizes = {cell.size.active for cell in found}
    lengths = {cell.tokens for cell in found}
    if len(sizes) < SIZES:
        raise ScalingError(
            f"{len(sizes)} sizes of models (active parameters without embedding and head: "
            f"{', '.join(map(str, sorted(sizes)))}): a law needs {SIZES}, and one more to be tested; add runs of others"
        )
    if len(lengths) == 1:
        form = Form(("N",), floor=len(found) > 4)
        return form, f"all runs have {min(lengths)} tokens: what more would do is not known" + _no_floor(form)
    if len(found) == len(sizes):
        form = Form(("C",), floor=len(found) > 4)
        return form, "each size has one number of tokens, so that theirs is one effect" + _no_floor(form)
    if len(found) < 6:
        raise ScalingError(
            f"{len(found)} pairs of size and tokens: a law over both needs 6; give more sizes several numbers of tokens"
        )
    form = Form(("N", "D"), floor=len(found) > 6 and len(lengths) > 2)
    return form, "sizes and numbers of tokens vary" + _no_floor(form)


def _no_floor(form: Form) -> str:
    return "" if form.floor else "; too few pairs of them to tell a floor, so that losses far beyond come out too low"


def _frontier(found: Sequence[Cell]) -> list[Cell]:
    """Cells whose loss no other has with as few operations."""
    kept: list[Cell] = []
    for cell in sorted(found, key=lambda cell: (cell.point["C"], cell.loss)):
        if not kept or cell.loss < kept[-1].loss:
            kept.append(cell)
    return kept


def _forecasts(laws: Laws, places: Sequence[dict[str, float]]) -> list[Forecast]:
    """Of places, whose intervals are to hold together."""
    low, high = laws.loss.interval(places, confidence=CONFIDENCE)
    return [
        Forecast(
            point=place,
            loss=float(loss),
            low=float(least),
            high=float(most),
            lr=laws.lr.at(place) if laws.lr else None,
            batch=laws.batch.at(place) if laws.batch else None,
        )
        for place, loss, least, most in zip(places, laws.loss.loss(places), low, high, strict=True)
    ]


def _before(others: Sequence[Cell], tokens: int) -> float | None:
    same = [cell for cell in others if cell.tokens == tokens]
    return max(same, key=lambda cell: cell.size.active).loss if same else None


def _place(runs: Sequence[ScalingRun], laws: Laws, target: RunConfig) -> dict[str, float]:
    """Where the target is.

    Raises:
        ScalingError: the laws do not reach there.
    """
    if text_of(target) != runs[0].text:
        raise ScalingError(
            "the target's text is another than the sweep's (data.*, train.sequence_length, train.document_mask, "
            "schedule.phases): give it the same settings, as experiment=... or data=..."
        )
    vocabulary = target.model.vocab_size or runs[0].vocabulary
    model = dataclasses.replace(target.model, vocab_size=vocabulary)
    size, tokens = size_of(model, length=target.train.sequence_length), build_plan(target).tokens
    if "D" not in laws.loss.form.over:
        usual = _usual_tokens(laws.cells, size)
        if not usual / AWAY <= tokens <= usual * AWAY:
            raise ScalingError(
                f"the target has {tokens} tokens where the sweep has about {usual:.0f} for its size, and what more or "
                "fewer do is not known: give the sweep several numbers of tokens for each size"
            )
    return point(size, tokens)


def _usual_tokens(found: Sequence[Cell], size: Size) -> float:
    """How many the sweep has for a model of this size: on a straight line in logarithms."""
    sizes, tokens = np.log([[cell.size.active, cell.tokens] for cell in found]).T
    return math.exp(np.polyval(np.polyfit(sizes, tokens, 1), math.log(size.active)))
