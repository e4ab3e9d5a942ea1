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
from k2train.paths import atomic_write, explain_oserror
from k2train.train.hooks import Hook
from k2train.train.phases import Step

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer

RECORD = "incident.json"


def incident(step: Step, decision: Decision) -> dict[str, Any]:
    """A step's record; numbers that are not finite are null."""
    findings = [
        {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(finding).items()}
        for finding in decision.findings
    ]
    return {
        "step": step.number + 1,
        "tokens": step.tokens_after,
        "incident": {
            "action": "logged" if decision.apply else "skipped",
            "sentence": decision.sentence(),
            "findings": findings,
            "samples": [step.first_sample, step.first_sample + step.samples],
            "phase": step.phase.name,
            "lr_ratio": step.lr_ratio,
        },
    }


class Incidents(Hook):
    """Writes ``incident.json`` into the folder of each incident. Made by rank 0 alone."""

    def __init__(self, folder: Path, *, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say

    def start(self, trainer: Trainer) -> None:
        """Removes those of steps that will be taken again."""
        for path in self._folder.glob("*"):
            if path.name.isdecimal() and int(path.name) > trainer.progress.step:
                shutil.rmtree(path, ignore_errors=True)

    def incident(self, record: Mapping[str, Any]) -> None:
        """Writes it; a disk that refuses is no reason to stop."""
        folder = self._folder / str(record["step"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / RECORD, json.dumps(record, indent=2) + "\n")
        except OSError as error:
            self._say(f"the incident of step {record['step']} is in metrics.jsonl alone: {explain_oserror(error)}")
