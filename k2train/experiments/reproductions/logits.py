"""Plain Muon's attention logits run away, and MuonClip holds them (K2, figure 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from k2train.experiments.reproduction import (
    Expectation,
    Findings,
    Reproduction,
    Trial,
    by_seed,
    curves,
    difference,
    where,
)
from k2train.report.chart import Chart, Level, heat_map, line_chart
from k2train.report.records import series

TAU, EXCESSIVE, SANE = 100.0, 0.04, 0.01

PLAIN = "plain Muon's largest logit"
TYPICAL = "99th percentile of MuonClip's largest logit over tau"
LARGEST = "MuonClip's largest logit over tau"
COST = "held-out loss of MuonClip less plain Muon's"
FIRED = "steps with a clip at the sane learning rate"


def runs(quick: bool) -> list[list[str]]:
    """Three arms with each seed."""
    form = (
        ["experiment=mini", "schedule.steps=320"]
        if quick
        else ["model=small", "track=off", "schedule.steps=4000", "validate.every=0", "checkpoint.every=1000"]
    )
    excessive = ["schedule=constant", f"optim.lr={EXCESSIVE}", "optim.weight_decay=0"]
    clipped = ["optim=muonclip", f"optim.tau={TAU}"]
    arms = [["optim=muon", *excessive], [*clipped, *excessive], [*clipped, f"optim.lr={SANE}"]]
    seeds = range(1, 4) if quick else range(1, 6)
    return [[*arm, *form, f"seed={seed}"] for arm in arms for seed in seeds]


def analyse(trials: Sequence[Trial]) -> Findings:
    """The largest logits of each arm, and what the clip cost."""
    plain = where(trials, optim__tau=None)
    clipped, sane = where(trials, optim__tau=TAU, optim__lr=EXCESSIVE), where(trials, optim__lr=SANE)
    heads = [head for layer in plain[0].run.steps[-1]["head_max_logit"].values() for head in layer]
    numbers = {
        PLAIN: by_seed(plain, _largest),
        TYPICAL: by_seed(clipped, lambda trial: float(np.nanpercentile(_logits(trial), 99)) / TAU),
        LARGEST: by_seed(clipped, lambda trial: _largest(trial) / TAU),
        COST: difference(by_seed(clipped, _loss), by_seed(plain, _loss)),
        FIRED: by_seed(sane, lambda trial: float(trial.result["clipped_steps"])),
        "largest logit at the sane learning rate": by_seed(sane, _largest),
        "held-out loss of plain Muon": by_seed(plain, _loss),
        "held-out loss of MuonClip": by_seed(clipped, _loss),
        "held-out loss at the sane learning rate": by_seed(sane, _loss),
        "share of MuonClip's steps with a clip, in the last quarter": by_seed(clipped, _clipped_late),
        f"plain Muon's heads beyond tau at some time, of {len(heads)}": by_seed(plain, _heads_beyond),
    }
    return Findings(numbers=numbers, charts=_charts({"plain Muon": plain, "MuonClip": clipped, "sane lr": sane}))


def _charts(arms: Mapping[str, Sequence[Trial]]) -> list[Chart | None]:
    """Of all seeds the largest logits and the loss; of the first, each head's logits."""

    heads = []
    for name in ("plain Muon", "MuonClip"):
        told = [record for record in arms[name][0].run.steps if "head_max_logit" in record]
        rows = [
            (f"{layer.removeprefix('layers.')}.{head}", [record["head_max_logit"][layer][head] for record in told])
            for layer, values in told[-1]["head_max_logit"].items()
            for head in range(len(values))
        ]
        heads.append(heat_map(f"{name}: layer and head", "largest logit", series(told, "step"), rows))
    logits = line_chart(
        "largest attention logit", "over steps", curves(arms, "max_logit"), levels=[Level(name="tau", y=TAU)], log=True
    )
    return [logits, line_chart("training loss", "nats a token, running mean", curves(arms, "loss", window=40)), *heads]


def _logits(trial: Trial) -> list[float]:
    return series(trial.run.steps, "max_logit")


def _largest(trial: Trial) -> float:
    return float(np.nanmax(_logits(trial)))


def _loss(trial: Trial) -> float:
    return trial.loss


def _clipped_late(trial: Trial) -> float:
    clipped = series(trial.run.steps, "clipped_heads")
    return float(np.mean(np.array(clipped[-len(clipped) // 4 :]) > 0))


def _heads_beyond(trial: Trial) -> float:
    told = [record["head_max_logit"] for record in trial.run.steps if "head_max_logit" in record]
    largest = np.max([np.concatenate([layers[name] for name in sorted(layers)]) for layers in told], axis=0)
    return float(np.sum(largest > TAU))


LOGITS = Reproduction(
    claim=(
        "With plain Muon the largest attention logit rises quickly past 1000; with MuonClip it is held at tau = "
        "100, at no cost in loss (Kimi K2, arXiv 2507.20534, section 2.1, figure 2; 9 B active of 53 B "
        "parameters)."
    ),
    here=(
        "At this size a sane learning rate never reaches tau. So the learning rate is deliberately excessive: "
        f"{EXCESSIVE}, constant and without weight decay, with plain Muon and with MuonClip; and {SANE} with both "
        "beside it, where nothing should be clipped. The clip acts after a step, so that until then a logit may "
        "exceed tau: that it stays below at every step is not what is expected."
    ),
    runs=runs,
    analyse=analyse,
    expected=(
        Expectation(number=PLAIN, at_least=500, premise=True),
        Expectation(number=TYPICAL, at_most=1.7),
        Expectation(number=LARGEST, at_most=2),
        Expectation(number=COST, at_most=0.02),
        Expectation(number=FIRED, at_most=0),
    ),
)
