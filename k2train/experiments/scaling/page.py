"""A study for people: tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from k2train.experiments.scaling.cells import CONFIDENCE, Cell, Optimum, Place
from k2train.experiments.scaling.law import Law
from k2train.experiments.scaling.study import Backtest, Forecast, Laws, Study
from k2train.experiments.scaling.trend import Trend
from k2train.units import count

FAR = 10  # times the largest size, tokens or operations of the sweep, from where on a forecast is a guess


def cell_rows(found: Sequence[Cell]) -> list[list[str]]:
    """A head, and a line for each cell."""
    rows = [["active", "total", "tokens", "FLOPs", "runs", "seeds", "loss", "best lr", "best batch", "with"]]
    for cell in found:
        sizes = [count(number) for number in (cell.size.active, cell.size.total, cell.tokens, cell.point["C"])]
        counts = [str(cell.runs), str(cell.seeds)]
        rows.append([*sizes, *counts, f"{cell.loss:.4f}", _optimum(cell.lr), _optimum(cell.batch), cell.others])
    return rows if any(cell.others for cell in found) else [row[:-1] for row in rows]


def _optimum(best: Optimum) -> str:
    if best.place is Place.INSIDE:
        return _within(best.value, (best.low, best.high))
    return f"{_short(best.tried)}, {best.place.value}"


def held_out_rows(backtest: Backtest) -> list[list[str]]:
    """A head, and a line for each cell that was left out."""
    rows = [["active", "tokens", "foretold", "loss", "within", "size before", "lr foretold", "best lr"]]
    for held in backtest.held_out:
        said, cell = held.forecast, held.cell
        rows.append(
            [
                *(count(cell.size.active), count(cell.tokens), _within(said.loss, (said.low, said.high))),
                *(f"{cell.loss:.4f}", "yes" if held.within else "no"),
                "-" if held.before is None else f"{held.before:.4f}",
                *("-" if said.lr is None else _within(said.lr[0], said.lr[1:]), _optimum(cell.lr)),
            ]
        )
    return rows


def law_lines(laws: Laws) -> list[str]:
    """The laws with their constants, and what they lack."""
    form = laws.loss.form
    lines = [f"{form}: {laws.why}", _constants(laws.loss)]
    if laws.compute:
        number = len(laws.compute.residuals)
        lines += [
            f"{laws.compute.form}, through the {number} that no other reaches with fewer FLOPs",
            _constants(laws.compute),
        ]
    for name, law, places in (
        ("best lr", laws.lr, [cell.lr.place for cell in laws.cells]),
        ("best batch, in tokens", laws.batch, [cell.batch.place for cell in laws.cells]),
    ):
        inside = places.count(Place.INSIDE)
        if law:
            lines.append(f"{name} = {_trend(law)}, from {inside} of {len(places)}")
        else:
            lines.append(f"{name}: no law, as it is inside what was tried in {inside} of {len(places)}")
    edges = sum(cell.lr.place is not Place.INSIDE for cell in laws.cells)
    if edges:
        lines.append(
            f"in {edges} of {len(laws.cells)} the best learning rate is at the edge of what was tried or not varied: "
            "the loss may be too high"
        )
    ratios = [cell.size.total / cell.size.active for cell in laws.cells]
    if max(ratios) > 1.25 * min(ratios):
        lines.append(
            f"total / active parameters go from {min(ratios):.2f} to {max(ratios):.2f}: N, the active ones, does not "
            "know of it"
        )
    return lines


def verdict(study: Study) -> str:
    """Of the test."""
    if study.backtest is None:
        return f"not tested: without the largest size {study.untested}"
    held = study.backtest.held_out
    inside = sum(one.within for one in held)
    said = (
        f"{study.backtest.outcome.value}: {inside} of {len(held)} losses of the largest size are within intervals that "
        f"hold all of them in {CONFIDENCE:.0%} of cases"
    )
    vague = sum(one.vague for one in held)
    return f"{said}; in {vague} of these that of the size before is as well, so that they say little" if vague else said


def forecast_lines(said: Forecast, laws: Laws, *, length: int) -> list[str]:
    """Of the target; ``length`` tokens are a sequence."""
    place = said.point
    lines = [
        f"target: {count(place['N'])} active parameters, {count(place['D'])} tokens, {count(place['C'])} FLOPs",
        f"loss {said.loss:.4f}, within {said.low:.4f} to {said.high:.4f} in {CONFIDENCE:.0%} of cases",
        f"optim.lr={_short(said.lr[0])}, within {_ends(said.lr[1:])}" if said.lr else "optim.lr: no law",
    ]
    if said.batch:
        lines.append(
            f"train.global_batch_size={max(1, round(said.batch[0] / length))}, in tokens within {_ends(said.batch[1:])}"
        )
    else:
        lines.append("train.global_batch_size: no law")
    for name, what in (("N", "parameters"), ("D", "tokens"), ("C", "FLOPs")):
        times = place[name] / max(cell.point[name] for cell in laws.cells)
        if times > FAR:
            lines.append(
                f"{times:.0f} times the {what} of the sweep's largest: the interval knows of no other form of law"
            )
    return lines


def _constants(law: Law) -> str:
    spread = law.spread(confidence=CONFIDENCE)
    named = [f"{name} = {_within(value, spread[name])}" for name, value in law.constants.items()]
    scatter = math.sqrt(float(law.residuals @ law.residuals) / (len(law.residuals) - law.form.parameters))
    return f"  {', '.join(named)}; around it losses scatter by {scatter:.2%}"


def _trend(law: Trend) -> str:
    powers = [f"{name}^({value:.3g} ± {half:.2g})" for name, (value, half) in law.exponents.items()]
    return " ".join([f"{law.factor:.3g}", *powers])


def _within(value: float, ends: Sequence[float]) -> str:
    """A value and its interval, where there is one."""
    return _short(value) if any(map(math.isnan, ends)) else f"{_short(value)} ({_ends(ends)})"


def _ends(values: Sequence[float]) -> str:
    return " to ".join(map(_short, values))


def _short(value: float) -> str:
    """Four digits of a loss; of what goes over orders of magnitude three."""
    return count(value) if 1e3 <= value < 1e15 else f"{value:.4g}" if 1 <= value < 10 else f"{value:.3g}"
