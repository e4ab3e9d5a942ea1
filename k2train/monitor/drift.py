"""What goes wrong slowly: a loss that no longer falls, attention logits that grow, experts that get no tokens, a source
that is forgotten. Warnings, never a veto.

A signal over the whole run is kept in at most BLOCKS blocks of equally many records, each their mean; when there are
more, neighbours become one. So what is compared grows with the run, and its noise shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

from k2train.monitor.detector import NORMAL, resistant_line

BLOCKS = 64
ENOUGH = 32  # blocks before anything is said
PLATEAU = 256  # records before a loss may be called flat
SURE = 12.0  # standard deviations of a block's noise that a rise must be
FORECAST = 128  # records after warm-up before a rise may be drawn out
EVEN = 4.0  # of them, that two rises may differ by and be the same
FASTEST = 2.0  # times the rise before it; beyond, it has only begun
STARVED = 0.1  # of the mean load of an expert
STARVING = 8  # measurements in a row in which it is starved
NAMED = 3  # experts that a sentence names
RISE = 0.02  # nats above the lowest loss of a source
RISEN = 3  # validations in a row in which it rises


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


def records_until(values: Trail, level: float) -> float | None:
    """After how many records a signal that rises reaches a level; None if it does not, or if nobody can tell.

    Of the newest half of the trail the rise in its later half is held against that in its earlier half. As that ratio
    is, so it is taken to go on: a rise that slows down converges, an even one is a line, one that grows by a factor is
    an exponential. What noise may have made of a line is one. It is told only if it holds for the smallest ratio that
    the noise allows, and no further ahead than there are records.

    Args:
        values: of the signal.
        level: above it.
    """
    if len(values.blocks) < ENOUGH or len(values.blocks) * values.size < FORECAST:
        return None
    half = len(values.blocks) // 4
    earlier, later = (
        resistant_line(part)[0] * half for part in (values.blocks[-2 * half : -half], values.blocks[-half:])
    )
    error, distance = values.noise(), level - median(values.blocks[-3:])
    if min(earlier, later) < SURE * error or min(earlier, later, distance) <= 0:
        return None
    least = (later - error) / (earlier + error)
    if later > FASTEST * earlier or _rises(distance, later, ratio=least) is None:
        return None
    bend = max(abs(later - earlier) - EVEN * error, 0.0)
    rises = _rises(distance, later, ratio=1 + math.copysign(bend, later - earlier) / earlier)
    ahead = math.inf if rises is None else rises * half
    return ahead * values.size if ahead <= len(values.blocks) else None


def _rises(distance: float, last: float, *, ratio: float) -> float | None:
    """How many rises, each ``ratio`` times the one before, come to a distance; None if all of them do not.

    Args:
        distance: positive.
        last: the rise before them, positive.
        ratio: positive.
    """
    first = last * ratio
    if abs(ratio - 1) < 1e-6:
        return distance / first
    reached = 1 + distance * (ratio - 1) / first  # ratio to the power of what is sought
    return math.log(reached) / math.log(ratio) if reached > 0 else None


class Drift:
    """Watches the records of a run; each kind of warning is said once in a phase."""

    def __init__(self, *, tau: float | None) -> None:
        """Has seen nothing.

        Args:
            tau: of QK-Clip; None: largest logits are not watched.
        """
        self._tau = tau
        self._begin("")

    def _begin(self, phase: str) -> None:
        self._phase, self._said = phase, set[str]()
        self._loss, self._logit, self._lr = Trail(), Trail(), 0.0
        self._starved: dict[str, int] = {}  # by expert: measurements in a row, newest included
        self._sets: dict[str, tuple[float, float, int]] = {}  # lowest loss, last, and validations that it has risen in

    def observe(self, record: Mapping[str, Any], *, steps: int) -> list[dict[str, Any]]:
        """The warnings that a record gives rise to: ``kind``, ``sentence``, and of a forecast the step.

        Args:
            record: of steps, as in metrics.jsonl.
            steps: of the whole run; what would happen after its end is not told.
        """
        if record["phase"] != self._phase:
            self._begin(record["phase"])
        if math.isfinite(record["loss"]):
            self._loss = self._loss.add(record["loss"])
        # In warm-up logits rise with the learning rate, which tells nothing of what comes after.
        if record["lr"] <= self._lr and 0 < record["max_logit"] < math.inf:
            self._logit = self._logit.add(record["max_logit"])
        self._lr = record["lr"]
        found: list[dict[str, Any]] = []
        if is_flat(self._loss):
            quarter = len(self._loss.blocks) // 4 * self._loss.size * record["steps"]
            found.append({"kind": "plateau", "sentence": f"the loss has not fallen for about {quarter:,} steps"})
        left = None if self._tau is None else records_until(self._logit, self._tau)
        if left is not None and (at := record["step"] + math.ceil(left * record["steps"])) <= steps:
            sentence = f"attention logits grow: at this rate the largest reaches tau={self._tau:g} at step {at:,}"
            found.append({"kind": "max_logit", "sentence": sentence, "at": at})
        if "expert_load" in record:
            found += self._starving(record["expert_load"])
        return self._new(found)

    def observe_validation(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The warnings that a validation gives rise to: sources whose loss rises while the run goes on.

        Args:
            record: as in metrics.jsonl; one on the whole of the held-out text is of another text than the others.
        """
        found: list[dict[str, Any]] = []
        for name, losses in record["sets"].items() if not record["whole"] else ():
            loss = losses["loss"]
            lowest, last, risen = self._sets.get(name, (loss, loss, 0))
            risen = risen + 1 if loss > max(last, lowest + RISE) else 0
            self._sets[name] = (min(lowest, loss), loss, risen)
            if risen >= RISEN:
                sentence = f"the loss on {name} rises: {loss:.4g} nats a token, after {lowest:.4g}"
                found.append({"kind": f"source {name}", "sentence": sentence})
        return self._new(found)

    def _starving(self, loads: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
        of_expert = {f"{layer} expert {e}": load for layer, row in loads.items() for e, load in enumerate(row)}
        self._starved = {n: self._starved.get(n, 0) + 1 for n, load in of_expert.items() if load < STARVED}
        starving = [name for name, times in self._starved.items() if times >= STARVING]
        if not starving:
            return []
        more = f" and {len(starving) - NAMED} more" if len(starving) > NAMED else ""
        sentence = (
            f"experts starve: {', '.join(starving[:NAMED])}{more} got less than {STARVED:.0%} of the mean load "
            f"{STARVING} times in a row"
        )
        return [{"kind": "experts", "sentence": sentence}]

    def _new(self, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        new = [warning for warning in found if warning["kind"] not in self._said]
        self._said |= {warning["kind"] for warning in new}
        return new

    def state_dict(self) -> dict[str, Any]:
        """Fit for JSON, exactly."""
        trails = {name: vars(trail) for name, trail in (("loss", self._loss), ("max_logit", self._logit))}
        own = {"lr": self._lr, "starved": self._starved, "sets": {n: list(found) for n, found in self._sets.items()}}
        return {"phase": self._phase, "said": sorted(self._said), **trails, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self._phase, self._said, self._lr = state["phase"], set(state["said"]), state["lr"]
        self._loss, self._logit = (
            Trail(**{**state[name], "blocks": tuple(state[name]["blocks"])}) for name in ("loss", "max_logit")
        )
        self._starved = dict(state["starved"])
        self._sets = {name: (lowest, last, risen) for name, (lowest, last, risen) in state["sets"].items()}
