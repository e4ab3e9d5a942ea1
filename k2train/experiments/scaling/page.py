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
    head = ["active", "total", "tokens", "FLOPs", "runs", "seeds", "loss", "best lr", "best batch", "with"]
    rows = [
        [
            *(count(number) for number in (cell.size.active, cell.size.total, cell.tokens, cell.point["C"])),
            *(
                str(cell.runs),
                str(cell.seeds),
                f"{cell.loss:.4f}",
                _optimum(cell.lr),
                _optimum(cell.batch),
                cell.others,
            ),
        ]
        for cell in found
    ]
    return [head, *rows] if any(cell.others for cell in found) else [row[:-1] for row in (head, *rows)]


def _optimum(best: Optimum) -> str:
    if best.place is Place.ALONE:
        return f"{_short(best.tried)}, {best.place.value}"
    if best.place is not Place.INSIDE:
        return f"{_short(best.tried)}, {best.place.value} tried"
    ends = [best.low, best.high]
    return _short(best.value) + ("" if any(map(math.isnan, ends)) else f" ({' to '.join(map(_short, ends))})")


def held_out_rows(backtest: Backtest) -> list[list[str]]:
    """A head, and a line for each cell that was left out."""
    rows = [["active", "tokens", "measured", "foretold", "within", "next smaller size", "lr measured", "lr foretold"]]
    for held in backtest.held_out:
        said = held.forecast
        rows.append(
            [
                *(count(held.cell.size.active), count(held.cell.tokens), f"{held.cell.loss:.4f}", f"{said.loss:.4f}"),
                f"{said.low:.4f} to {said.high:.4f}: {'yes' if held.within else 'no'}",
                "-" if held.before is None else f"{held.before:.4f}",
                *(_optimum(held.cell.lr), _interval(said.lr)),
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
    """Of the test, in a line."""
    if study.backtest is None:
        return f"not tested: without the largest size {study.untested}"
    held = study.backtest.held_out
    inside = sum(one.within for one in held)
    return (
        f"{study.backtest.outcome.value}: {inside} of {len(held)} losses of the largest size are within intervals that "
        f"hold all of them in {CONFIDENCE:.0%} of cases"
    )


def forecast_lines(said: Forecast, laws: Laws, *, length: int) -> list[str]:
    """Of the target; ``length`` tokens are a sequence."""
    place = said.point
    lines = [
        f"target: {count(place['N'])} active parameters, {count(place['D'])} tokens, {place['C']:.3g} FLOPs",
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
    named = [f"{name} = {value:.3g} ({_ends(spread[name])})" for name, value in law.constants.items()]
    scatter = math.sqrt(float(law.residuals @ law.residuals) / (len(law.residuals) - law.form.parameters))
    return f"  {', '.join(named)}; around it losses scatter by {scatter:.2%}"


def _trend(law: Trend) -> str:
    powers = [f"{name}^({value:.3g} ± {half:.2g})" for name, (value, half) in law.exponents.items()]
    return " ".join([f"{law.factor:.3g}", *powers])


def _interval(values: tuple[float, float, float] | None) -> str:
    return "-" if values is None else f"{_short(values[0])} ({_ends(values[1:])})"


def _ends(values: Sequence[float]) -> str:
    return " to ".join(map(_short, values))


def _short(value: float) -> str:
    return f"{value:.3g}"
