"""What becomes of a step: whether its update may happen, decided from its loss and its raw gradient norm.

Every process decides alike, as it decides from the same numbers and the same history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k2train.config import MonitorConfig
from k2train.monitor.detector import Finding, Rule, Series, observe

LOSS_FLOOR = 0.02  # nats a token
NORM_FLOOR = 0.05  # of the natural logarithm


@dataclass(frozen=True)
class Decision:
    """About one step."""

    apply: bool
    findings: tuple[Finding, ...] = ()

    def sentence(self) -> str:
        """What was found; empty where nothing was."""
        return ", and ".join(_describe(finding) for finding in self.findings)


class Monitor:
    """Remembers the losses and gradient norms of a run's recent steps."""

    def __init__(self, config: MonitorConfig) -> None:
        """Remembers nothing yet."""
        self._skips = config.action == "skip"
        self._rules = {
            "loss": Rule(config.loss_deviations, LOSS_FLOOR, config.window, falls=True),
            "grad_norm": Rule(config.grad_norm_deviations, NORM_FLOOR, config.window),
        }
        self._phase, self._series = 0, {signal: Series() for signal in self._rules}

    def decide(self, *, loss: float, grad_norm: float, phase: int) -> Decision:
        """Whether a step may be applied; its numbers become part of what is remembered, unless they are flagged.

        A step that is not finite is never applied and leaves no trace in what is remembered.

        Args:
            loss: mean over the tokens of the step.
            grad_norm: before clipping.
            phase: of the schedule. A new one may have other data and another batch: what was before says nothing of it.
        """
        numbers = {"loss": loss, "grad_norm": grad_norm}
        bad = [Finding(name, v, math.nan, math.inf) for name, v in numbers.items() if not math.isfinite(v)]
        if bad:
            return Decision(apply=False, findings=tuple(bad))
        if phase != self._phase:
            self._phase, self._series = phase, {signal: Series() for signal in self._rules}
        findings = []
        for signal, rule in self._rules.items():
            # Norms are ratios: their logarithm is what scatters evenly.
            value = numbers[signal] if signal == "loss" else math.log(max(numbers[signal], 1e-30))
            found, self._series[signal] = observe(self._series[signal], value, rule, signal=signal)
            if found is not None:
                expected = found.expected if signal == "loss" else math.exp(found.expected)
                findings.append(Finding(signal, numbers[signal], expected, found.deviations))
        # A fall may be a text that is known by heart; it is no reason to learn nothing.
        rises = any(finding.deviations > 0 for finding in findings)
        return Decision(apply=not (rises and self._skips), findings=tuple(findings))

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, fit for JSON."""
        return {"phase": self._phase, **{signal: series.state_dict() for signal, series in self._series.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self._phase = int(state["phase"])
        self._series = {signal: Series.of_state(state[signal]) for signal in self._rules}


def _describe(finding: Finding) -> str:
    name = {"loss": "the loss", "grad_norm": "the gradient", "max_logit": "an attention logit"}[finding.signal]
    if not math.isfinite(finding.value):
        return f"{name} is not finite"
    what = name if finding.signal == "loss" else "the gradient's norm"
    return (
        f"{what} is {finding.value:.4g}, {abs(finding.deviations):.0f} deviations "
        f"{'above' if finding.deviations > 0 else 'below'} {finding.expected:.4g}"
    )
