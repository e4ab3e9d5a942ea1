"""A step of a run, taken again from a checkpoint before it: what it was like, and whether it was the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from k2train.monitor import Decision
from k2train.train.evidence import evidence
from k2train.train.incidents import incident

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer

Record = Mapping[str, Any]
TELEMETRY = ("layer_", "head_", "expert_")  # of docs/metrics.md, what is of the step itself


@dataclass(frozen=True)
class Replay:
    """Of the steps from a checkpoint to the one that is asked for."""

    incident: Record  # of that step, as in metrics.jsonl
    evidence: Mapping[str, Any]  # on it, by the name of a file: as of an incident, and its telemetry
    records: Sequence[Record]  # of all the steps, as in metrics.jsonl


def replay(trainer: Trainer, step: int) -> Replay:
    """Takes the steps up to ``step``, all ranks together.

    The last one is applied if it is finite, whatever the run has done, so that its update can be looked at too.

    Args:
        trainer: has resumed from before the step.
        step: as metrics.jsonl counts them.
    """
    assert trainer.progress.step < step <= trainer.plan.steps
    records, trainer.telemetry.asked = [], step
    while trainer.progress.step < step:
        taken = trainer.plan.step(trainer.progress.step)
        if taken.number + 1 == step:
            trainer.monitor.action = "log"
        applied = trainer.step()
        if trainer.progress.step % trainer.config.track.log_every == 0 or trainer.progress.step == trainer.plan.steps:
            records.append(trainer.record())
    told = records[-1] if records and records[-1]["step"] == step else trainer.telemetry.take()
    telemetry = {key: value for key, value in told.items() if key.startswith(TELEMETRY)}
    found = {**(trainer.evidence or evidence(trainer, taken)), "telemetry": telemetry}
    described = trainer.incident
    if described is None:
        worst = {key: value for row in found["documents"][:1] for key, value in row.items() if key != "text"}
        described = incident(taken, Decision(apply=applied), action="explained", document=worst)
    return Replay(described, found, records)


def compared(found: Replay, steps: Sequence[Record], incidents: Sequence[Record]) -> tuple[int, list[str]]:
    """How many records of the run the replay was held against, and a sentence on each that differs in any bit.

    Args:
        found: the replay.
        steps: the run's records of steps.
        incidents: the run's records of incidents.
    """
    pairs = [
        (f"the loss of step {theirs['step']}", ours["loss"], theirs["loss"])
        for ours in found.records
        for theirs in steps
        # A step that the run has refused is applied in the replay if it is the last.
        if ours["step"] == theirs["step"] and ours["skipped_steps"] == theirs["skipped_steps"]
    ]
    last = found.incident["incident"].get("findings", [])
    for record in incidents:
        if record["step"] == found.incident["step"]:
            for ours, theirs in zip(last, record["incident"].get("findings", []), strict=False):
                pairs.append((f"{theirs['signal']} of step {record['step']}", ours["value"], theirs["value"]))
    differing = [f"{what} was {theirs} and is {ours}" for what, ours, theirs in pairs if _plain(ours) != theirs]
    return len(pairs), differing


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
