"""What goes wrong slowly: a loss that no longer falls, and attention logits that grow. Warnings, never a veto.

A signal over the whole run is kept in at most BLOCKS blocks of equally many records, each their mean; when there are
more, neighbours become one. So what is compared grows with the run, and its noise shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

from k2train.monitor.detector import NORMAL, resistant_line

BLOCKS = 64
ENOUGH = 32  # blocks before anything is said
PLATEAU = 256  # records before a loss may be called flat
SURE = 4.0  # standard deviations of a block's noise that a rise must be


@dataclass(frozen=True)
class Trail:
    """A signal over the run."""

    blocks: tuple[float, ...] = ()
    size: int = 1  # records of a block
    part: float = 0.0  # sum of those of the block that is not full
    parts: int = 0

    def add(self, value: float) -> Trail:
        """The trail with the next record's value, which is finite."""
        longer = replace(self, part=self.part + value, parts=self.parts + 1)
        if longer.parts < longer.size:
            return longer
        blocks = (*self.blocks, longer.part / longer.size)
        if len(blocks) < BLOCKS:
            return Trail(blocks, self.size)
        return Trail(tuple((a + b) / 2 for a, b in zip(blocks[::2], blocks[1::2], strict=True)), 2 * self.size)

    def noise(self) -> float:
        """Standard deviation of a block, robust, from the differences of neighbours."""
        differences = [after - before for before, after in pairwise(self.blocks)]
        centre = median(differences)
        return NORMAL * median(abs(d - centre) for d in differences) / math.sqrt(2)


def is_flat(losses: Trail) -> bool:
    """Whether the loss of the last quarter of the run is no lower than that of the quarter before."""
    blocks = losses.blocks
    if len(blocks) < ENOUGH or len(blocks) * losses.size < PLATEAU:
        return False
    quarter = len(blocks) // 4
    return median(blocks[-quarter:]) >= median(blocks[-2 * quarter : -quarter])


def records_until(logarithms: Trail, level: float) -> float | None:
    """After how many records a signal that grows by a constant factor reaches a level; None if it does not grow.

    Args:
        logarithms: of the signal.
        level: of the signal itself, positive.
    """
    recent = logarithms.blocks[-(len(logarithms.blocks) // 2) :]
    if len(logarithms.blocks) < ENOUGH:
        return None
    slope, offset = resistant_line(recent)
    if slope * len(recent) < SURE * logarithms.noise() or slope <= 0:
        return None
    distance = math.log(level) - (offset + slope * (len(recent) - 1))
    return distance / slope * logarithms.size if distance > 0 else None


class Drift:
    """Watches the records of a run; each kind of warning is said once in a phase."""

    def __init__(self, *, tau: float | None) -> None:
        """Has seen nothing.

        Args:
            tau: of QK-Clip; None: largest logits are not watched.
        """
        self._tau = tau
        self._phase, self._said, self._loss, self._logit = "", set[str](), Trail(), Trail()

    def observe(self, record: Mapping[str, Any], *, steps: int) -> list[dict[str, Any]]:
        """The warnings that a record gives rise to: ``kind``, ``sentence``, and of a forecast the step.

        Args:
            record: of steps, as in metrics.jsonl.
            steps: of the whole run; what would happen after its end is not told.
        """
        if record["phase"] != self._phase:
            self._phase, self._said, self._loss, self._logit = record["phase"], set(), Trail(), Trail()
        if math.isfinite(record["loss"]):
            self._loss = self._loss.add(record["loss"])
        if 0 < record["max_logit"] < math.inf:
            self._logit = self._logit.add(math.log(record["max_logit"]))
        found: list[dict[str, Any]] = []
        if is_flat(self._loss):
            quarter = len(self._loss.blocks) // 4 * self._loss.size * record["steps"]
            found.append({"kind": "plateau", "sentence": f"the loss has not fallen for about {quarter:,} steps"})
        left = None if self._tau is None else records_until(self._logit, self._tau)
        if left is not None and (at := record["step"] + math.ceil(left * record["steps"])) <= steps:
            sentence = f"attention logits grow: at this rate the largest reaches tau={self._tau:g} at step {at:,}"
            found.append({"kind": "max_logit", "sentence": sentence, "at": at})
        new = [warning for warning in found if warning["kind"] not in self._said]
        self._said |= {warning["kind"] for warning in new}
        return new

    def state_dict(self) -> dict[str, Any]:
        """Fit for JSON, exactly."""
        trails = {name: vars(trail) for name, trail in (("loss", self._loss), ("max_logit", self._logit))}
        return {"phase": self._phase, "said": sorted(self._said), **trails}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self._phase, self._said = state["phase"], set(state["said"])
        self._loss, self._logit = (
            Trail(**{**state[name], "blocks": tuple(state[name]["blocks"])}) for name in ("loss", "max_logit")
        )
