"""Twice the attention heads gain little (K2, section 2.3, figure 6)."""

from __future__ import annotations

from collections.abc import Sequence

from k2train.experiments.reproduction import Expectation, Findings, Reproduction, Trial, by_seed, curves, where
from k2train.report.chart import line_chart

FEW, MANY = 4, 8
# Of one expert: what the further heads need of parameters, the experts have less.
WIDTHS = {FEW: 64, MANY: 52}

GAIN = "per cent of held-out loss that twice the heads gain"


def runs(quick: bool) -> list[list[str]]:
    """Both numbers of heads with each seed."""
    form = ["experiment=mini", "optim=muonclip", "optim.lr=0.008"]
    form += [f"schedule.steps={400 if quick else 4000}"]
    return [
        [*form, f"model.num_attention_heads={heads}", f"model.moe_intermediate_size={width}", f"seed={seed}"]
        for heads, width in WIDTHS.items()
        for seed in range(1, 4 if quick else 6)
    ]


def analyse(trials: Sequence[Trial]) -> Findings:
    """The loss of both."""
    arms = {heads: where(trials, model__num_attention_heads=heads) for heads in WIDTHS}
    losses = {heads: by_seed(arm, lambda trial: trial.loss) for heads, arm in arms.items()}
    gain = {seed: 100 * (1 - losses[MANY][seed] / losses[FEW][seed]) for seed in losses[FEW]}
    numbers = {GAIN: gain} | {f"held-out loss with {heads} heads": values for heads, values in losses.items()}
    numbers |= {
        f"parameters with {heads} heads": by_seed(arm, lambda trial: trial.result["parameters_total"])
        for heads, arm in arms.items()
    }
    named = {f"{heads} heads": arm for heads, arm in arms.items()}
    chart = line_chart("training loss", "nats a token over tokens", curves(named, "loss", x="tokens", window=40))
    return Findings(numbers=numbers, charts=[chart])


HEADS = Reproduction(
    claim=(
        "Doubling the attention heads, from as many as layers, lowers the loss by 0.5 to 1.2 % only (Kimi K2, arXiv "
        "2507.20534, section 2.3, figure 6)."
    ),
    here=(
        f"{FEW} heads and {MANY} of the same size, with narrower experts for the latter, so that both models have as "
        "many parameters; one learning rate, the same text."
    ),
    runs=runs,
    analyse=analyse,
    expected=(Expectation(number=GAIN, at_most=1.2),),
)
