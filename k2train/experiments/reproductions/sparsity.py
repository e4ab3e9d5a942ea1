"""More experts at a fixed number of active ones: a lower loss for the same operations (K2, figure 5)."""

from __future__ import annotations

from collections.abc import Sequence

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
from k2train.report.chart import line_chart

EXPERTS = (8, 16, 32)  # of which 2 are active: sparsities of 4, 8 and 16

GAIN = f"held-out loss with {EXPERTS[-1]} experts less that with {EXPERTS[0]}"


def runs(quick: bool) -> list[list[str]]:
    """Each number of experts with each seed."""
    form = ["experiment=mini", "optim=muonclip", "optim.lr=0.008"]
    form += ["schedule.steps=400"] if quick else ["model=small", "schedule.steps=4000", "train.global_batch_size=32"]
    seeds = range(1, 4) if quick else range(1, 6)
    return [[*form, f"model.n_routed_experts={experts}", f"seed={seed}"] for experts in EXPERTS for seed in seeds]


def analyse(trials: Sequence[Trial]) -> Findings:
    """The loss of each sparsity."""
    arms = {experts: where(trials, model__n_routed_experts=experts) for experts in EXPERTS}
    losses = {experts: by_seed(arm, lambda trial: trial.loss) for experts, arm in arms.items()}
    numbers = {GAIN: difference(losses[EXPERTS[-1]], losses[EXPERTS[0]])}
    numbers |= {f"held-out loss with {experts} experts": values for experts, values in losses.items()}
    numbers |= {
        f"active parameters with {experts} experts": by_seed(arm, lambda trial: trial.result["parameters_active"])
        for experts, arm in arms.items()
    }
    named = {f"{experts} experts": arm for experts, arm in arms.items()}
    chart = line_chart("training loss", "nats a token over tokens", curves(named, "loss", x="tokens", window=40))
    return Findings(numbers=numbers, charts=[chart])


SPARSITY = Reproduction(
    claim=(
        "At a fixed number of active experts more experts in all lower the loss at equal operations (Kimi K2, arXiv "
        "2507.20534, section 2.3, figure 5)."
    ),
    here=(
        "Two active experts of 8, 16 or 32 of the same size, one learning rate, the same text. The router's own "
        "operations, which grow with the experts, are below one in a hundred."
    ),
    runs=runs,
    analyse=analyse,
    expected=(Expectation(number=GAIN, at_most=0),),
)
