"""What a reproduction is: runs, what is read off them, what was expected, and the verdict.

A reproduction is a claim of a report, the runs that test it in the small, and a function from the finished runs to
numbers by seed. What must be true of a number is stated as data before anything is run, so that the verdict is not a
matter of taste:

- an expectation **holds** if the number is within its bound for every seed, and so is the whole 95 % interval of its
  mean over seeds (Student's t: the runs of other seeds are to be spoken of, not these alone);
- it **does not hold** if the whole interval is beyond the bound;
- else it is **not shown at this scale**: as with a single seed, which has no interval.

A premise is a fact about these runs without which they say nothing, as that the best learning rate is none at the
edge of its sweep: if it is not so for every seed, nothing is shown.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k2train.experiments.statistics import interval
from k2train.experiments.sweep import Row
from k2train.report import Run
from k2train.report.chart import Chart, Series, running_mean
from k2train.report.records import series

Values = Mapping[int, float]  # of a number, by seed


class Outcome(enum.Enum):
    """Of an expectation, and of a reproduction."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    NOT_SHOWN = "not shown at this scale"


@dataclass(frozen=True)
class Trial:
    """A finished run of a reproduction."""

    row: Row
    run: Run

    @property
    def seed(self) -> int:
        """Of weights and order."""
        return int(self.settings["seed"])

    @property
    def settings(self) -> Mapping[str, Any]:
        """By their dotted keys."""
        return self.row.settings

    @property
    def result(self) -> Mapping[str, Any]:
        """The contents of summary.json."""
        assert self.row.results is not None, "the runs are finished"
        return self.row.results

    @property
    def loss(self) -> float:
        """Nats a token on all of the held-out text, at the end."""
        return float(self.result["validation_loss"])


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What must be true of a number.

    Attributes:
        number: its name in the findings.
        at_most: the largest value that it may have.
        at_least: the smallest.
        premise: see the module.
    """

    number: str
    at_most: float | None = None
    at_least: float | None = None
    premise: bool = False

    @property
    def bound(self) -> str:
        """In signs."""
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"

    def judge(self, values: Values) -> Outcome:
        """The verdict on the values of all seeds."""
        every = all(map(self._within, values.values()))
        if self.premise:
            return Outcome.HOLDS if every else Outcome.NOT_SHOWN
        mean = interval(list(values.values()))
        ends = (mean.low, mean.high)
        if every and all(map(self._within, ends)):
            return Outcome.HOLDS
        if all(map(self._beyond, ends)):
            return Outcome.DOES_NOT_HOLD
        return Outcome.NOT_SHOWN

    def _within(self, value: float) -> bool:
        """NaN, an end of the interval of a single value, is neither within nor beyond."""
        return self._over(value) <= 0

    def _beyond(self, value: float) -> bool:
        return self._over(value) > 0

    def _over(self, value: float) -> float:
        if self.at_most is not None:
            return value - self.at_most
        assert self.at_least is not None, "one of the bounds is given"
        return self.at_least - value


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was read off the runs.

    Attributes:
        numbers: each by seed. Those that nothing was expected of are shown too.
        charts: of the figure.
    """

    numbers: Mapping[str, Values]
    charts: Sequence[Chart | None]


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A claim, and how it is tested.

    Attributes:
        claim: what the report says, with where it says so.
        here: what is done here, and how it differs.
        runs: overrides of each run of ``k2train train``; of the quick form if it is given True.
        analyse: from the finished runs to what they say.
        expected: before anything was run.
    """

    claim: str
    here: str
    runs: Callable[[bool], Sequence[Sequence[str]]]
    analyse: Callable[[Sequence[Trial]], Findings]
    expected: Sequence[Expectation]

    def verdict(self, findings: Findings) -> Outcome:
        """Of all expectations: the first that a premise, a failure or a doubt decides."""
        premises, others = (
            [e.judge(findings.numbers[e.number]) for e in self.expected if e.premise is premise]
            for premise in (True, False)
        )
        if Outcome.NOT_SHOWN in premises:
            return Outcome.NOT_SHOWN
        return next((o for o in (Outcome.DOES_NOT_HOLD, Outcome.NOT_SHOWN) if o in others), Outcome.HOLDS)


def by_seed(trials: Sequence[Trial], number: Callable[[Trial], float]) -> dict[int, float]:
    """A number of trials that differ in the seed alone, by seed."""
    return {trial.seed: number(trial) for trial in sorted(trials, key=lambda trial: trial.seed)}


def difference(one: Values, other: Values) -> dict[int, float]:
    """Of two numbers, for each seed."""
    return {seed: one[seed] - other[seed] for seed in one}


def where(trials: Sequence[Trial], **settings: Any) -> list[Trial]:
    """Those with these settings; dots of the keys are written as two underscores, as in ``optim__lr=0.1``."""
    wanted = {key.replace("__", "."): value for key, value in settings.items()}
    return [trial for trial in trials if all(trial.settings[key] == value for key, value in wanted.items())]


def curves(arms: Mapping[str, Sequence[Trial]], key: str, *, x: str = "step", window: int = 1) -> list[Series]:
    """A number of the records of steps: a colour for each arm, a dash for each of its seeds.

    Args:
        arms: by the name that the legend has.
        key: of the records.
        x: ``step`` or ``tokens``.
        window: records of a running mean.
    """
    return [
        Series(
            name=f"{name}, seed {trial.seed}",
            x=series(trial.run.steps, x),
            y=running_mean(series(trial.run.steps, key), window=window),
            colour=colour,
            dash=dash,
        )
        for colour, (name, trials) in enumerate(arms.items())
        for dash, trial in enumerate(trials)
    ]
