"""The figure of a study: losses over sizes and operations with their laws, the test, and the best learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from k2train.experiments.scaling.cells import Cell, Place
from k2train.experiments.scaling.study import Backtest, Laws, Study
from k2train.report import Chart, Series, named_lines
from k2train.report.chart import LEFT, RIGHT, WIDTH, line_chart, log_ticks
from k2train.units import count

CURVE = 40  # points of a law's curve
LAW = 1  # dash of what is no measurement


def charts(study: Study) -> list[Chart]:
    """Those that there is something to draw in."""
    laws = study.laws
    found = [_sizes(laws), _operations(laws), study.backtest and _test(study.backtest), _learning_rates(laws)]
    return [chart for chart in found if chart]


def _sizes(laws: Laws) -> Chart | None:
    curves = []
    for colour, (tokens, own) in enumerate(_by_tokens(laws.cells).items()):
        name = f"{count(tokens)} tokens"
        curves.append(_measured(name, [cell.point["N"] for cell in own], [cell.loss for cell in own], colour))
        places = [own[0].point | {"N": size} for size in _between([cell.point["N"] for cell in own])]
        if "C" not in laws.loss.form.over and len(own) > 1:
            curves.append(_law([place["N"] for place in places], laws.loss.loss(places).tolist(), colour))
    return _log_lines("Loss over active parameters", "dashed: the law", curves)


def _operations(laws: Laws) -> Chart | None:
    curves = []
    for colour, size in enumerate(sorted({cell.size.active for cell in laws.cells})):
        own = sorted((cell for cell in laws.cells if cell.size.active == size), key=lambda cell: cell.tokens)
        name = f"{count(size)} active"
        curves.append(_measured(name, [cell.point["C"] for cell in own], [cell.loss for cell in own], colour))
    if laws.compute:
        places = _between([cell.point["C"] for cell in laws.cells])
        losses = laws.compute.loss([{"C": place} for place in places]).tolist()
        curves.append(_law(places, losses, len(curves), name=str(laws.compute.form)))
    return _log_lines("Loss over operations", "by size", curves)


def _test(backtest: Backtest) -> Chart | None:
    held = backtest.held_out
    said = [one.forecast for one in held]
    places = range(len(held))
    curves = [
        Series(name="measured", x=places, y=[one.cell.loss for one in held], dots=True),
        Series(
            name="foretold by the others",
            x=places,
            y=[(one.low + one.high) / 2 for one in said],
            spread=[(one.high - one.low) / 2 for one in said],
            colour=1,
            dash=LAW,
            dots=True,
        ),
        Series(
            name="next smaller size",
            x=places,
            y=[math.nan if one.before is None else one.before for one in held],
            colour=2,
            dots=True,
        ),
    ]
    names = [count(one.cell.tokens) for one in held]
    return named_lines("The largest size, foretold", "loss over tokens, intervals of 90 %", names, curves)


def _learning_rates(laws: Laws) -> Chart | None:
    curves = []
    for colour, (tokens, own) in enumerate(_by_tokens(laws.cells).items()):
        inside = [cell for cell in own if cell.lr.place is Place.INSIDE]
        if not inside:
            continue
        sizes = [cell.point["N"] for cell in inside]
        reach = [(cell.lr.high - cell.lr.low) / 2 for cell in inside]
        spread = [half if math.isfinite(half) else 0.0 for half in reach]
        curves.append(_measured(f"{count(tokens)} tokens", sizes, [cell.lr.value for cell in inside], colour, spread))
        if laws.lr and "C" not in laws.lr.over:
            places = [own[0].point | {"N": size} for size in _between([cell.point["N"] for cell in own])]
            curves.append(_law([place["N"] for place in places], [laws.lr.at(place)[0] for place in places], colour))
    return _log_lines("Best learning rate over active parameters", "dashed: the law", curves)


def _by_tokens(cells: Sequence[Cell]) -> dict[int, list[Cell]]:
    return {
        tokens: sorted((cell for cell in cells if cell.tokens == tokens), key=lambda cell: cell.size.active)
        for tokens in sorted({cell.tokens for cell in cells})
    }


def _between(values: Sequence[float]) -> list[float]:
    return list(np.geomspace(min(values), max(values), CURVE))


def _measured(name: str, x: Sequence[float], y: Sequence[float], colour: int, spread: Sequence[float] = ()) -> Series:
    return Series(name=name, x=x, y=y, colour=colour, dots=True, spread=spread)


def _law(x: Sequence[float], y: Sequence[float], colour: int, name: str = "") -> Series:
    return Series(name=name, x=x, y=y, colour=colour, dash=LAW)


def _log_lines(title: str, unit: str, curves: Sequence[Series]) -> Chart | None:
    """Curves over a logarithmic axis; None if there is nothing to draw."""
    if not curves:
        return None
    ends = [end for curve in curves for end in (curve.x[0], curve.x[-1])]
    first, last = math.log10(min(ends)), math.log10(max(ends))
    logs = [replace(curve, x=[math.log10(x) for x in curve.x]) for curve in curves]
    chart = line_chart(title, unit, logs)
    if chart is not None and last > first:
        width = (WIDTH - LEFT - RIGHT) / (last - first)
        chart.x_ticks = [
            (LEFT + (math.log10(tick) - first) * width, _tick(tick)) for tick in log_ticks(10**first, 10**last)
        ]
    return chart


def _tick(value: float) -> str:
    return count(value) if value < 1e15 else f"{value:.0e}".replace("e+", "e")
