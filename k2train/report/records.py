"""What a run has left on disk, read as it stands: finished, running or dead.

Nothing but ``config.json`` and ``metrics.jsonl`` has to be there. A line that is no record is left out and counted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2train.lock import is_held
from k2train.paths import RunPaths, incident_name
from k2train.status import OK

Record = Mapping[str, Any]


class ReportError(ValueError):
    """There is nothing to report on; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its files tell it.

    Attributes:
        folder: of the run.
        config: as plain values.
        steps: records of steps, in order.
        validations: records of validations, in order.
        samples: texts written on the way, as ``{"step": ..., "text": ...}``.
        incidents: by their step, the contents of the JSON files in the folder of each, by name; ``incident`` is the
            record.
        summary: the result; None if the run is not finished.
        state: in words.
        damaged: lines and files that are none and were left out.
    """

    folder: Path
    config: Mapping[str, Any]
    steps: Sequence[Record]
    validations: Sequence[Record]
    samples: Sequence[Record]
    incidents: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    state: str
    damaged: int

    @property
    def name(self) -> str:
        """As people call it."""
        return str(self.config.get("name", self.folder.name))


def read_run(folder: Path) -> Run:
    """Reads a run's files.

    Raises:
        ReportError: the folder is no run, or the run has recorded nothing yet.
        OSError: a file is there and cannot be read.
    """
    paths = RunPaths(folder)
    config = read_config(folder)
    if not paths.metrics.is_file():
        raise ReportError(f"the run {folder} has no {paths.metrics.name} yet: wait for its first step")
    lines, damaged = read_lines(paths.metrics.read_text(encoding="utf-8", errors="replace"))
    steps, validations, strange = in_order(lines)
    if not steps and not validations:
        raise ReportError(f"the run {folder} has recorded nothing yet: wait for its first step")
    samples: list[Record] = []
    if paths.samples.is_file():
        samples, torn = read_lines(paths.samples.read_text(encoding="utf-8", errors="replace"))
        damaged += torn
    last = samples[-1]["step"] if samples else 0
    if paths.sample.is_file() and steps and last < steps[-1]["step"]:
        samples.append({"step": steps[-1]["step"], "text": paths.sample.read_text(encoding="utf-8", errors="replace")})
    incidents: dict[str, dict[str, Any]] = {incident_name(record): {"incident": record} for record in strange}
    for path in sorted(paths.incidents.glob("*/*.json")):
        content = _object(path)
        damaged += content is None
        if content is not None:
            incidents.setdefault(path.parent.name, {})[path.stem] = content
    incidents = dict(sorted(incidents.items(), key=lambda item: (len(item[0].partition("-")[0]), item[0])))
    summary = _object(paths.summary) if paths.summary.is_file() else None
    if summary and steps and number(summary.get("steps")) < steps[-1]["step"]:
        summary = None  # of the run before it was made longer
    return Run(
        folder=folder,
        config=config,
        steps=steps,
        validations=validations,
        samples=samples,
        incidents=incidents,
        summary=summary,
        state="finished" if summary else run_state(folder),
        damaged=damaged,
    )


def read_config(folder: Path) -> Mapping[str, Any]:
    """The config of a run as plain values.

    Raises:
        ReportError: the folder is no run.
    """
    paths = RunPaths(folder)
    if not paths.config.is_file():
        why = f"it has no {paths.config.name}" if folder.is_dir() else "there is no such folder"
        raise ReportError(f"{folder} is no run: {why}; give the folder of one, as in runs/first")
    config = _object(paths.config)
    if config is None:
        raise ReportError(f"{paths.config} is damaged: start the run again, which writes it anew")
    return config


def run_state(folder: Path) -> str:
    """Whether a run goes on, or how it ended: running, finished, ended with status N, or died."""
    paths = RunPaths(folder)
    if is_held(paths.lock):
        return "running"
    status = paths.exit_status.read_text(encoding="utf-8").strip() if paths.exit_status.is_file() else ""
    if status == str(OK):
        return "finished"
    return f"ended with status {status}" if status else "died without a word"


class Tail:
    """Lines as they are appended to a file, which a run that starts again may replace by another."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file, self._read, self._torn = 0, 0, b""

    def read(self) -> tuple[bool, str]:
        """Whether the file is another one than the last time, and the whole lines that are new."""
        try:
            with open(self._path, "rb") as file:
                found = os.fstat(file.fileno())
                if anew := found.st_ino != self._file or found.st_size < self._read:
                    self._file, self._read, self._torn = found.st_ino, 0, b""
                file.seek(self._read)
                fresh = file.read()
        except FileNotFoundError:
            return False, ""
        self._read += len(fresh)
        whole, newline, self._torn = (self._torn + fresh).rpartition(b"\n")
        return anew, (whole + newline).decode(errors="replace")


def read_lines(text: str) -> tuple[list[Record], int]:
    """The records among lines of JSON, and how many lines are none."""
    records: list[Record] = []
    damaged = 0
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            damaged += 1
    return records, damaged


def in_order(records: Sequence[Record]) -> tuple[list[Record], list[Record], list[Record]]:
    """The records of steps, of validations and of incidents, each in order of steps.

    A run that was resumed repeats steps: what it writes of a step replaces what was there of that and of later ones.
    So it is with one that has gone back to a checkpoint, but for the record that says so.
    """
    steps: list[Record] = []
    validations: list[Record] = []
    incidents: list[Record] = []
    rewinds: list[Record] = []
    for record in records:
        if (to := rewound_to(record)) is not None:
            for kept in (steps, validations, incidents):
                while kept and kept[-1]["step"] > to:
                    kept.pop()
            rewinds.append(record)
            continue
        # An incident comes before the record of its step, and a validation after it.
        into, replaced = steps, [steps, validations]
        if is_incident(record):
            into, replaced = incidents, [incidents]
        elif is_validation(record):
            into, replaced = validations, [validations]
        for kept in replaced:
            while kept and kept[-1]["step"] >= record["step"]:
                kept.pop()
        into.append(record)
    return steps, validations, sorted([*incidents, *rewinds], key=lambda record: int(record["step"]))


def rewound_to(record: Record) -> int | None:
    """The step of the checkpoint that the run went back to here; None if it did not."""
    found = record.get("incident")
    return found.get("to") if isinstance(found, dict) and found.get("action") == "rewound" else None


def is_validation(record: Record) -> bool:
    """Whether it is of the loss on held-out text."""
    return "validation_loss" in record


def is_incident(record: Record) -> bool:
    """Whether it is of a step that was out of the ordinary."""
    return "incident" in record


def series(records: Sequence[Record], key: str) -> list[float]:
    """The values of a key; NaN where it is absent or not finite."""
    return [number(record.get(key)) for record in records]


def number(value: Any) -> float:
    """A finite number as it is, anything else as NaN."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def warnings(run: Run) -> Iterator[tuple[int | None, str]]:
    """What a person should look at: (step, sentence)."""
    for record in run.steps:
        if text := warning(record):
            yield record["step"], text
    for name, files in run.incidents.items():
        yield None, f"incident at {name}: {sentence(files.get('incident', {}))}"


def warning(record: Record) -> str:
    """What a person should look at in a record; empty if there is nothing."""
    if skipped := record.get("skipped_steps"):
        return f"{skipped} step{' was' if skipped == 1 else 's were'} not applied"
    return sentence(record)


def sentence(record: Record) -> str:
    """What an incident's record says of it."""
    found = record.get("incident")
    return str(found.get("sentence", "")) if isinstance(found, dict) else ""


def _object(path: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
