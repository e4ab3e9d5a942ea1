"""The knobs of what watches a run, and of the faults by which that is tested. See docs/monitor.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from k2train.config.rules import rule

# See k2train.train.inject.
FAULTS = (
    "random_tokens",
    "one_token",
    "shuffled_tokens",
    "half_batch",
    "bad_document",
    "lr_x10",
    "lr_x30",
    "lr_x100",
    "gradient_x1000",
    "gradient_nan",
    "loss_inf",
)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is out of the ordinary in a step, and what becomes of it."""

    # of a step whose numbers are finite; one with others is never applied
    action: str = rule(one_of=("log", "skip", "rewind"))
    rewinds: int = rule(at_least=1)  # of a run, at most
    rewind_window: int = rule(at_least=1)  # steps whose samples are left out, the last of them out of the ordinary
    window: int = rule(at_least=24)  # steps that the next is held against
    loss_deviations: float = rule(above=0)  # robust standard deviations from what was to be expected
    grad_norm_deviations: float = rule(above=0)  # of its logarithm
    document_deviations: float = rule(above=0)  # of the largest loss of a document


@dataclass(frozen=True, kw_only=True)
class InjectConfig:
    """Faults on purpose, to test what watches a run."""

    allow: bool = rule()  # without it faults are refused
    faults: dict[str, str] = rule()  # by step, as metrics.jsonl counts them

    def check(self) -> Iterator[str]:
        """Sentences on faults that are not meant, or that do not exist."""
        if self.faults and not self.allow:
            yield "faults spoils a run on purpose, for tests of the monitor: set inject.allow=true if that is meant"
        for step, fault in self.faults.items():
            if not step.isdecimal() or int(step) < 1:
                yield f"faults.{step} must be the number of a step, from 1"
            if fault not in FAULTS:
                yield f"faults.{step}={fault!r} must be one of {', '.join(FAULTS)}"
