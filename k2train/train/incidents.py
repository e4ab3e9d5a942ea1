"""What is kept of each step that was out of the ordinary: a folder of its own, ``incidents/STEP``."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2train.monitor import Decision
from k2train.paths import atomic_write, explain_oserror, incident_name
from k2train.train.evidence import as_text
from k2train.train.hooks import Hook
from k2train.train.phases import Step

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer

TEXT = "incident.txt"


def write_incident(folder: Path, record: Mapping[str, Any], evidence: Mapping[str, Any]) -> None:
    """Writes an incident's folder: its record and each part of the evidence as JSON, and a page of text for a person.

    Raises:
        OSError: the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ({"incident": record} | dict(evidence)).items():
        part = {name: content} if isinstance(content, list) else content
        atomic_write(folder / f"{name}.json", json.dumps(part, indent=2) + "\n")
    atomic_write(folder / TEXT, "\n".join(as_text(record, evidence)) + "\n")


def incident(step: Step, decision: Decision, *, action: str, **more: Any) -> dict[str, Any]:
    """A step's record; numbers that are not finite are null.

    Args:
        step: as it was taken.
        decision: on it.
        action: what became of it: logged, skipped, rewound or stopped.
        more: ``document``, the worst of the step; of a rewind its ``rewind``, a number from 1, ``to``, the step of the
            checkpoint, and ``left_out``, the first and the last sample of the stream.
    """
    sentence = decision.sentence()
    if any(finding.signal == "document" for finding in decision.findings):
        sentence += f" ({more['document']['name']}, {more['document']['origin']})"
    findings = [
        {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(finding).items()}
        for finding in decision.findings
    ]
    return {
        "step": step.number + 1,
        "tokens": step.tokens_after,
        "incident": {
            "action": action,
            **more,
            "sentence": sentence,
            "findings": findings,
            "samples": [step.first_sample, step.first_sample + step.samples],
            "phase": step.phase.name,
            "lr_ratio": step.lr_ratio,
        },
    }


class Incidents(Hook):
    """Writes the folder of each incident. Made by rank 0 alone."""

    def __init__(self, folder: Path, *, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say

    def start(self, trainer: Trainer) -> None:
        """Removes those of steps that will be taken again."""
        self._trainer = trainer
        self._forget(trainer.progress.step)

    def rewound(self, step: int) -> None:
        """Removes those of steps that will be taken again."""
        self._forget(step)

    def incident(self, record: Mapping[str, Any]) -> None:
        """Writes it; a disk that refuses is no reason to stop."""
        folder = self._folder / incident_name(record)
        try:
            write_incident(folder, record, self._trainer.evidence)
        except OSError as error:
            self._say(f"the incident of step {record['step']} is in metrics.jsonl alone: {explain_oserror(error)}")

    def _forget(self, step: int) -> None:
        for path in self._folder.glob("*"):
            if path.name.isdecimal() and int(path.name) > step:
                shutil.rmtree(path, ignore_errors=True)
