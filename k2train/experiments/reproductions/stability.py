"""No loss spike at sane settings (K2, figure 3), and where instability begins beyond them."""

from __future__ import annotations

from collections.abc import Sequence

from k2train.experiments.reproduction import Expectation, Findings, Reproduction, Trial, by_seed, curves, where
from k2train.report.chart import line_chart

OPTIMIZERS = ("muon", "muonclip", "adamw")
RATES = (0.01, 0.03, 0.1, 0.3)
TAUS = (10.0, 30.0)  # beside K2's 100, at RATES[2]
LOST = 0.5  # nats a token above the best loss of the optimizer from which on a learning rate counts as unstable

SPIKES = "steps out of the ordinary, in long runs of MuonClip at a sane learning rate"
WARNINGS = "warnings of starving experts and growing logits in these"


def runs(quick: bool) -> list[list[str]]:
    """Long runs at a sane learning rate, and short ones over learning rates and tau, with each seed."""
    form = ["experiment=mini"] if quick else ["experiment=mini", "model=small"]
    short, long = (
        ("schedule.steps=200", "schedule.steps=1000") if quick else ("schedule.steps=1000", "schedule.steps=20000")
    )
    arms = [["optim=muonclip", "optim.lr=0.01", long]]
    arms += [[f"optim={name}", f"optim.lr={lr}", short] for name in OPTIMIZERS for lr in RATES]
    arms += [["optim=muonclip", f"optim.lr={RATES[2]}", f"optim.tau={tau}", short] for tau in TAUS]
    return [[*form, *arm, f"seed={seed}"] for arm in arms for seed in range(1, 4)]


def analyse(trials: Sequence[Trial]) -> Findings:
    """Spikes of the long runs, and the loss of the short ones."""
    longest = max(trial.result["steps"] for trial in trials)
    long = [trial for trial in trials if trial.result["steps"] == longest]
    short = [trial for trial in trials if trial.result["steps"] < longest]
    numbers = {SPIKES: by_seed(long, _spikes), WARNINGS: by_seed(long, lambda t: len(t.run.incidents) - _spikes(t))}
    for name in OPTIMIZERS:
        own = [trial for trial in where(short, optim__name=name) if trial.settings["optim.tau"] in (None, 100.0)]
        losses = {lr: by_seed(where(own, optim__lr=lr), lambda trial: trial.loss) for lr in RATES}
        numbers[f"{name}: largest learning rate within {LOST} nats of its best loss"] = {
            seed: max(lr for lr in RATES if losses[lr][seed] <= min(v[seed] for v in losses.values()) + LOST)
            for seed in losses[RATES[0]]
        }
        numbers |= {f"{name}: held-out loss at {lr}": values for lr, values in losses.items()}
    for tau in (*TAUS, 100.0):
        own = where(short, optim__name="muonclip", optim__lr=RATES[2], optim__tau=tau)
        numbers[f"tau {tau:g} at {RATES[2]}: held-out loss"] = by_seed(own, lambda trial: trial.loss)
        numbers[f"tau {tau:g} at {RATES[2]}: largest logit"] = by_seed(own, lambda trial: trial.result["max_logit"])
    chart = line_chart("training loss of the long runs", "every step", curves({"MuonClip": long}, "loss"))
    return Findings(numbers=numbers, charts=[chart])


def _spikes(trial: Trial) -> float:
    """Steps whose loss or gradient norm the monitor found out of the ordinary."""
    return float(sum("findings" in incident["incident"]["incident"] for incident in trial.run.incidents.values()))


STABILITY = Reproduction(
    claim="15.5 T tokens without one loss spike (Kimi K2, arXiv 2507.20534, section 2.1 and figure 3).",
    here=(
        "Long runs of MuonClip at a sane learning rate, in which the monitor tells no step whose loss or gradient norm "
        "is out of the ordinary; and short ones over learning rates up to where each optimizer fails, and over tau. At "
        "this size no spike is known that the clip prevents: an excessive learning rate ends in a plateau."
    ),
    runs=runs,
    analyse=analyse,
    expected=(Expectation(number=SPIKES, at_most=0),),
)
