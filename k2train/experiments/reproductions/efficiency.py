"""Muon reaches AdamW's loss with fewer tokens (Moonlight, figure 1a)."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

import numpy as np

from k2train.experiments.reproduction import Expectation, Findings, Reproduction, Trial, Values, by_seed, where
from k2train.experiments.statistics import interval
from k2train.report import named_lines
from k2train.report.chart import Chart, Level, Series, line_chart
from k2train.report.records import series
from k2train.units import count

LEARNING_RATES = {"adamw": (0.001, 0.002, 0.004, 0.008), "muon": (0.004, 0.008, 0.016, 0.032)}
VALIDATIONS = 10  # of a run
LARGE = 1e9  # parameters, about where Moonlight measured

RATIO = "Muon's tokens over AdamW's to AdamW's loss, at the size where it is largest"
INSIDE = "places from the best learning rate to the edge of its sweep"


def runs(quick: bool) -> list[list[str]]:
    """Both optimizers, each with as many learning rates, with each seed, at each size."""
    mini = ["experiment=mini", "train.global_batch_size=16", "train.micro_batch_size=16"]
    sizes = {320: mini}  # by steps
    if not quick:
        sizes |= {1280: [*mini, "model=nano"], 5120: [*mini, "model=small", "model.num_hidden_layers=6"]}
    return [
        [
            *(f"optim={optimizer}", f"optim.lr={lr}", *overrides),
            *(f"schedule.steps={steps}", f"validate.every={steps // VALIDATIONS}", f"seed={seed}"),
        ]
        for steps, overrides in sizes.items()
        for optimizer, rates in LEARNING_RATES.items()
        for lr in rates
        for seed in (1, 2, 3)
    ]


def analyse(trials: Sequence[Trial]) -> Findings:
    """Each optimizer at its best learning rate, at each size."""
    sizes: dict[int, list[Trial]] = {}
    for trial in trials:
        sizes.setdefault(trial.result["parameters_total"], []).append(trial)
    numbers: dict[str, Values] = {}
    ratios: dict[int, Values] = {}
    charts, places = [], []
    for size, own in sorted(sizes.items()):
        (adamw, first), (muon, second) = (best(where(own, optim__name=name)) for name in LEARNING_RATES)
        ratios[size] = {one.seed: token_ratio(one, other) for one, other in _pairs(muon, adamw)}
        places += [first, second]
        numbers |= {
            f"{count(size)} parameters: {name}": values
            for name, values in {
                "tokens to AdamW's loss": ratios[size],
                "time to AdamW's loss": {
                    one.seed: ratios[size][one.seed] * _speed(other) / _speed(one) for one, other in _pairs(muon, adamw)
                },
                "AdamW's best learning rate": by_seed(adamw, _lr),
                "Muon's best learning rate": by_seed(muon, _lr),
                "AdamW's held-out loss": by_seed(adamw, lambda trial: trial.loss),
                "Muon's held-out loss": by_seed(muon, lambda trial: trial.loss),
            }.items()
        }
        charts += [_swept(size, own), _curves(size, adamw, muon)]
    seeds = ratios[min(sizes)]
    decided = {
        RATIO: {seed: max(values[seed] for values in ratios.values()) for seed in seeds},
        INSIDE: dict.fromkeys(seeds, float(min(places))),
    }
    return Findings(numbers=decided | _trend(ratios) | numbers, charts=charts)


def best(trials: Sequence[Trial]) -> tuple[list[Trial], int]:
    """Those with the learning rate of the least mean loss, and how far it is from the edge of the sweep."""
    rates = sorted({_lr(trial) for trial in trials})
    losses = [statistics.fmean(trial.loss for trial in where(trials, optim__lr=lr)) for lr in rates]
    place = losses.index(min(losses))
    return where(trials, optim__lr=rates[place]), min(place, len(rates) - 1 - place)


def token_ratio(muon: Trial, adamw: Trial) -> float:
    """The share of AdamW's tokens after which Muon has its loss; above 1, the inverse for AdamW.

    Muon's learning rate has not fallen as far by then as AdamW's at its end: a run that is planned for fewer tokens
    would do better. So this is an upper bound.
    """
    reached = tokens_to(muon, adamw.loss)
    if math.isnan(reached):
        return float(adamw.result["tokens"] / tokens_to(adamw, muon.loss))
    return float(reached / adamw.result["tokens"])


def tokens_to(trial: Trial, loss: float) -> float:
    """Tokens after which the held-out loss is first this low, on lines between validations; NaN if it never is."""
    tokens, losses = (series(trial.run.validations, key) for key in ("tokens", "validation_loss"))
    points = list(zip(tokens, losses, strict=True))
    for (before, high), (after, low) in itertools.pairwise(points):
        if low <= loss < high:
            return before + (after - before) * (high - loss) / (high - low)
    return points[0][0] if points[0][1] <= loss else math.nan


def _trend(ratios: dict[int, Values]) -> dict[str, Values]:
    """Of each seed the straight line through the ratios over the logarithm of the parameters."""
    if len(ratios) < 2:
        return {}
    x = np.log10(list(ratios))
    lines = {
        seed: np.polyfit(x, [values[seed] for values in ratios.values()], 1) for seed in next(iter(ratios.values()))
    }
    return {
        "change of the ratio with ten times the parameters": {seed: float(line[0]) for seed, line in lines.items()},
        "ratio that the line has at 1 B parameters (Moonlight: 0.52)": {
            seed: float(np.polyval(line, math.log10(LARGE))) for seed, line in lines.items()
        },
    }


def _swept(size: int, trials: Sequence[Trial]) -> Chart | None:
    rates = sorted({_lr(trial) for trial in trials})
    curves = []
    for colour, (name, optimizer) in enumerate({"AdamW": "adamw", "Muon": "muon"}.items()):
        own = where(trials, optim__name=optimizer)
        means = [interval([t.loss for t in own if _lr(t) == lr] or [math.nan]) for lr in rates]
        spread = [mean.half for mean in means]
        curves.append(
            Series(name=name, x=range(len(rates)), y=[m.mean for m in means], spread=spread, colour=colour, dots=True)
        )
    return named_lines(
        f"{count(size)} parameters", "held-out loss over learning rates", [f"{lr:g}" for lr in rates], curves
    )


def _curves(size: int, adamw: Sequence[Trial], muon: Sequence[Trial]) -> Chart | None:
    curves = [
        Series(
            name=f"{name}, seed {trial.seed}",
            x=series(trial.run.validations, "tokens"),
            y=series(trial.run.validations, "validation_loss"),
            colour=colour,
            dash=dash,
        )
        for colour, (name, trials) in enumerate({"AdamW": adamw, "Muon": muon}.items())
        for dash, trial in enumerate(trials)
    ]
    level = Level(name="AdamW at the end", y=statistics.fmean(trial.loss for trial in adamw))
    return line_chart(f"{count(size)} parameters", "held-out loss over tokens", curves, levels=[level])


def _pairs(muon: Sequence[Trial], adamw: Sequence[Trial]) -> list[tuple[Trial, Trial]]:
    return [(one, other) for one in muon for other in adamw if one.seed == other.seed]


def _lr(trial: Trial) -> float:
    return float(trial.settings["optim.lr"])


def _speed(trial: Trial) -> float:
    """Tokens a second of the usual step, which other work on the machine does not blur."""
    return statistics.median(series(trial.run.steps, "tokens_per_second"))


EFFICIENCY = Reproduction(
    claim=(
        "Muon reaches AdamW's loss with 52 % of the operations (Moonlight, arXiv 2502.16982, figure 1a and section "
        "3.3, at compute-optimal lengths)."
    ),
    here=(
        "Both optimizers get as many learning rates, warm-up, a constant part and a decay, and the same text in "
        "the same order. The ratio is read off Muon's curve at its best learning rate: tokens after which it is "
        "below AdamW's last held-out loss at AdamW's best. Muon's learning rate has not fallen to the end by then, "
        "so that it is an upper bound. Time is that ratio times what a step costs, by the median of all steps."
    ),
    runs=runs,
    analyse=analyse,
    expected=(
        Expectation(number=INSIDE, at_least=1, premise=True),
        Expectation(number=RATIO, at_most=0.8),
    ),
)
