"""What becomes of a step: whether its update may happen, decided from its losses and its raw gradient norm.

Every process decides alike, as it decides from the same numbers and the same history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from k2train.config import MonitorConfig
from k2train.monitor.detector import LEAST, Finding, Rule, Series, observe

LOSS_FLOOR = 0.02  # nats a token
NORM_FLOOR = 0.05  # of the natural logarithm
NORM_LEAST = math.log(20)  # a few odd words make a norm ten times as large, of which clipping leaves nothing
# Deviations of loss and gradient norm in two steps are told if they have this mean, none counted as more than MOST.
TOGETHER, MOST = 2.5, 3.0
NOTHING = Series().state_dict()  # in a checkpoint that is older than the signal
DOCUMENT_FLOOR = 0.3  # nats a token: text differs


@dataclass(frozen=True)
class Decision:
    """About one step."""

    apply: bool
    rewind: bool = False  # whether the run is to go back to a checkpoint
    findings: tuple[Finding, ...] = ()

    def sentence(self) -> str:
        """What was found; empty where nothing was."""
        return ", and ".join(_describe(finding) for finding in self.findings)


class Monitor:
    """Remembers the losses and gradient norms of a run's recent steps.

    Attributes:
        action: on steps that are finite, as ``monitor.action``.
    """

    def __init__(self, config: MonitorConfig) -> None:
        """Remembers nothing yet."""
        self.action = config.action
        self._rules = {
            "loss": Rule(config.loss_deviations, LOSS_FLOOR, config.window, falls=True),
            "grad_norm": Rule(config.grad_norm_deviations, NORM_FLOOR, config.window, least=NORM_LEAST),
            "document": Rule(config.document_deviations, DOCUMENT_FLOOR, config.window),
        }
        self._phase, self._series = 0, {signal: Series() for signal in self._rules}
        self._raised = 0.0  # deviations of loss and gradient norm in the step before, each of MOST at most; their sum

    @property
    def expected_loss(self) -> float:
        """The level of the loss; 0 before there is any."""
        recent = self._series["loss"].values[-LEAST:]
        return median(recent) if recent else 0.0

    def history(self) -> dict[str, list[float]]:
        """What is remembered of each signal, the newest last."""
        return {
            signal: [math.exp(v) if signal == "grad_norm" else v for v in series.values]
            for signal, series in self._series.items()
        }

    def decide(self, *, loss: float, grad_norm: float, document: float, phase: int) -> Decision:
        """Whether a step may be applied; its numbers become part of what is remembered, unless they are flagged.

        A step that is not finite is never applied and leaves no trace in what is remembered.

        Args:
            loss: mean over the tokens of the step.
            grad_norm: before clipping.
            document: the largest loss of a document of the step.
            phase: of the schedule. A new one may have other data and another batch: what was before says nothing of it.
        """
        numbers = {"loss": loss, "grad_norm": grad_norm, "document": document}
        bad = [Finding(name, v, math.nan, math.inf) for name, v in numbers.items() if not math.isfinite(v)]
        if bad:
            return Decision(apply=False, findings=tuple(bad))
        if phase != self._phase:
            self._phase, self._raised, self._series = phase, 0.0, {signal: Series() for signal in self._rules}
        findings: list[Finding] = []
        raised = 0.0
        for signal, rule in self._rules.items():
            # Norms are ratios: their logarithm is what scatters evenly.
            ratio = signal == "grad_norm"
            value = math.log(max(numbers[signal], 1e-30)) if ratio else numbers[signal]
            found, flagged, self._series[signal] = observe(self._series[signal], value, rule, signal=signal)
            if found is not None and signal != "document":
                raised += min(found.deviations, MOST)
            if found is not None and flagged:
                expected = math.exp(found.expected) if ratio else found.expected
                findings.append(Finding(signal, numbers[signal], expected, found.deviations))
        # A learning rate that was too high for a step makes both a little too large for some steps.
        mean, self._raised = (self._raised + raised) / 4, raised
        if mean > TOGETHER and not findings:
            findings, self._raised = [Finding("together", mean, 0.0, mean)], 0.0
        # A fall may be a text that is known by heart; one document is one of many; what comes late has happened.
        rises = any(finding.deviations > 0 and finding.signal in ("loss", "grad_norm") for finding in findings)
        return Decision(
            apply=self.action == "log" or not rises,
            rewind=rises and self.action == "rewind",
            findings=tuple(findings),
        )

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, fit for JSON."""
        series = {signal: series.state_dict() for signal, series in self._series.items()}
        return {"phase": self._phase, "raised": self._raised, **series}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self._phase, self._raised = int(state["phase"]), float(state.get("raised", 0.0))
        self._series = {signal: Series.of_state(state.get(signal, NOTHING)) for signal in self._rules}


def _describe(finding: Finding) -> str:
    if finding.signal == "together":
        return "loss and gradient have both been larger than expected for two steps"
    name = {
        "loss": "the loss",
        "grad_norm": "the gradient",
        "document": "a document's loss",
        "max_logit": "an attention logit",
    }[finding.signal]
    if not math.isfinite(finding.value):
        return f"{name} is not finite"
    what = "the gradient's norm" if finding.signal == "grad_norm" else name
    return (
        f"{what} is {finding.value:.4g}, {abs(finding.deviations):.0f} deviations "
        f"{'above' if finding.deviations > 0 else 'below'} {finding.expected:.4g}"
    )
