"""Muon's weights use more directions than AdamW's (Moonlight, section 3.4: SVD entropy)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from k2train.experiments.reproduction import (
    Expectation,
    Findings,
    Reproduction,
    Trial,
    Values,
    by_seed,
    difference,
    where,
)
from k2train.report.chart import Series, line_chart

# By a part of the parameter's name, the first that fits.
ROLES = {
    "self_attn.": "attention",
    ".mlp.gate.weight": "router",
    ".mlp.experts.": "experts",
    ".shared_experts.": "shared experts",
    ".mlp.": "dense feed-forward",
}
EVERY = "SVD entropy under Muon less that under AdamW, at the role where it is least"
ROUTER = "that of the router less the mean of the other roles"


def runs(quick: bool) -> list[list[str]]:
    """Both optimizers, each at its best learning rate, with each seed."""
    form = ["experiment=mini", "track.spectrum_every=50", "train.global_batch_size=16", "train.micro_batch_size=16"]
    form += ["schedule.steps=320"] if quick else ["model=small", "schedule.steps=4000"]
    arms = (["optim=muon", "optim.lr=0.008"], ["optim=adamw", "optim.lr=0.002"])
    return [[*arm, *form, f"seed={seed}"] for arm in arms for seed in range(1, 4 if quick else 6)]


def analyse(trials: Sequence[Trial]) -> Findings:
    """The entropies at the end by role, and on the way."""
    arms = {name: where(trials, optim__name=name) for name in ("muon", "adamw")}
    last = {name: {trial.seed: _by_role(_spectra(trial)[-1][1]) for trial in arm} for name, arm in arms.items()}
    roles = list(next(iter(last["muon"].values())))
    gaps: dict[str, Values] = {}
    numbers: dict[str, Values] = {}
    for role in roles:
        muon, adamw = ({seed: found[role] for seed, found in last[name].items()} for name in arms)
        gaps[role] = difference(muon, adamw)
        numbers |= {f"{role}, Muon": muon, f"{role}, AdamW": adamw}
    seeds = gaps["router"]
    decided = {
        EVERY: {seed: min(gaps[role][seed] for role in roles) for seed in seeds},
        ROUTER: {
            seed: gaps["router"][seed] - statistics.fmean(gaps[role][seed] for role in roles if role != "router")
            for seed in seeds
        },
    }
    numbers |= {"held-out loss, Muon": by_seed(arms["muon"], lambda trial: trial.loss)}
    numbers |= {"held-out loss, AdamW": by_seed(arms["adamw"], lambda trial: trial.loss)}
    curves = [
        Series(
            name=f"{role}, {label}",
            x=[step for step, _ in spectra],
            y=[_by_role(entropies)[role] for _, entropies in spectra],
            colour=colour,
            dash=dash,
        )
        for colour, role in enumerate(roles)
        for dash, (label, arm) in enumerate({"Muon": arms["muon"], "AdamW": arms["adamw"]}.items())
        for spectra in [_spectra(arm[0])]
    ]
    return Findings(numbers=decided | numbers, charts=[line_chart("SVD entropy", "over steps, first seed", curves)])


def _spectra(trial: Trial) -> list[tuple[float, dict[str, float]]]:
    """(step, entropy of each matrix)."""
    return [(record["step"], record["weight_entropy"]) for record in trial.run.steps if "weight_entropy" in record]


def _by_role(entropies: dict[str, float]) -> dict[str, float]:
    """The mean over the matrices of a role."""
    found: dict[str, list[float]] = {}
    for name, entropy in entropies.items():
        role = next(role for part, role in ROLES.items() if part in name)
        found.setdefault(role, []).append(entropy)
    return {role: statistics.fmean(values) for role, values in found.items()}


SPECTRUM = Reproduction(
    claim=(
        "Weights trained with Muon have a higher SVD entropy than AdamW's, most of all the router's (Moonlight, arXiv "
        "2502.16982, section 3.4)."
    ),
    here="Both at the learning rate that was best for them in the efficiency reproduction, with the same text.",
    runs=runs,
    analyse=analyse,
    expected=(Expectation(number=EVERY, at_least=0), Expectation(number=ROUTER, at_least=0)),
)
