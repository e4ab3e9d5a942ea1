"""A sweep: runs that differ in some settings, each in a folder of its own that is found again by its config.

    sweep = Sweep(
        Path("runs/lr"),  # holds a folder for each run
        [[*common, f"optim.lr={lr}", f"seed={seed}"] for lr in (0.01, 0.02) for seed in (1, 2, 3)],
        compose=run_config,  # from overrides to a RunConfig, as k2train.cli.multirun has it
    )
    rows = sweep.run(local(jobs=2), tell=print)

Each run is a process of ``k2train train``. A run is keyed by those settings that decide what is learnt, and by those
others that the runs of the sweep differ in. A sweep that is started again therefore skips what is finished, goes on
with what was stopped, and begins what is new, however the overrides are written; a run that has failed is tried again.
A failure ends that run alone. Nothing is kept but the files of the runs, with one ``trial.json`` in each, so that a
sweep may be killed at any time.

A ``Row`` has ``choices``, the keys that were overridden with their values, the run's ``folder`` (whose curves
``k2train.report.read_run`` reads), and ``results``, the contents of summary.json. ``varied(rows)`` names the choices
that differ; ``k2train.experiments.table`` makes tables of rows, over seeds with intervals.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2train.config import RunConfig, is_harmless, leaves, to_dict
from k2train.experiments.launch import Launcher
from k2train.lock import held_alone
from k2train.paths import RunPaths, atomic_write
from k2train.units import duration

Settings = Mapping[str, Any]

TRAIN = (sys.executable, "-m", "k2train", "train")
PLACE = ("name", "runs_dir", "track")  # where a run goes, whatever the sweep
BUSY = "goes on with this sweep; wait for it to end, or stop it"


@dataclass(frozen=True)
class Row:
    """A run of a sweep, as its files tell it."""

    folder: Path
    settings: Settings  # all of them, by their dotted keys
    overrides: Sequence[str]  # that make them
    choices: Settings  # keys and groups that are overridden, and their values
    results: Mapping[str, Any] | None  # summary.json; None if the run is not finished
    failure: str | None  # why its last start failed; None if it did not

    @property
    def state(self) -> str:
        """In a word."""
        return "finished" if self.results is not None else "failed" if self.failure else "not finished"


class Sweep:
    """Runs in a folder.

    Args:
        folder: of the sweep; its name becomes the group of the runs (``track.group``), unless they have one.
        runs: the overrides of each run; those that come to the same config are one run.
        compose: from overrides to the config, which may raise ConfigError.
        command: that overrides are appended to.
    """

    def __init__(
        self,
        folder: Path,
        runs: Sequence[Sequence[str]],
        *,
        compose: Callable[[Sequence[str]], RunConfig],
        command: Sequence[str] = TRAIN,
    ) -> None:
        self.folder = folder
        self.command = command
        configs = [compose(words) for words in runs]
        settings = [dict(leaves(to_dict(config))) for config in configs]
        choices = [_choices(words, own) for words, own in zip(runs, settings, strict=True)]
        differing, named = _differing(settings), _differing(choices)
        self._overrides: dict[Path, Sequence[str]] = {}
        self._settings: dict[Path, Settings] = {}
        for words, config, own, chosen in zip(runs, configs, settings, choices, strict=True):
            path = _folder(folder, own, differing, {key: chosen.get(key) for key in named})
            place = [f"name={path.name}", f"runs_dir={folder}"]
            if config.track.group is None:
                place.append(f"track.group={folder.name}")
            self._overrides[path], self._settings[path] = (*words, *place), own

    def run(self, launch: Launcher, *, tell: Callable[[str], None]) -> list[Row]:
        """Runs what is not finished, and returns all rows, in the order of the runs.

        Args:
            launch: starts the processes, as ``k2train.experiments.launch.local(jobs=2)``.
            tell: is given a line for each run that ends.

        Raises:
            OSError: another process goes on with this sweep, or the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with held_alone(self.folder / "lock", patience=0, busy=BUSY):
            for folder, words in self._overrides.items():
                folder.mkdir(exist_ok=True)
                _write_trial(folder, words, self._settings[folder], None)
            wanted = [row.folder for row in self.rows() if row.results is None]
            total, done = len(self._overrides), len(self._overrides) - len(wanted)
            if done:
                tell(f"{done} of {total} runs are finished")
            begin = time.monotonic()
            commands = {folder: [*self.command, *self._overrides[folder]] for folder in wanted}
            with contextlib.closing(launch(commands)) as ending:
                for folder, status in ending:
                    done += 1
                    row, elapsed = self._ended(folder, status), duration(time.monotonic() - begin)
                    tell(f"[{done}/{total}, {elapsed}] {folder.name}: {row.failure or row.state}")
        return self.rows()

    def rows(self) -> list[Row]:
        """All runs of this sweep, as their files tell them now."""
        return [row for folder in self._overrides if (row := read_row(folder))]

    def _ended(self, folder: Path, status: int) -> Row:
        """Writes down a failure."""
        if not RunPaths(folder).summary.exists():
            failure = _failure(status, RunPaths(folder).terminal)
            _write_trial(folder, self._overrides[folder], self._settings[folder], failure)
        row = read_row(folder)
        assert row is not None
        return row


def read_rows(folder: Path) -> list[Row]:
    """All runs that were ever part of the sweep in a folder, in the order of their names."""
    return [row for path in sorted(folder.glob("*/")) if (row := read_row(path))]


def read_row(folder: Path) -> Row | None:
    """A run of a sweep; None if the folder is none."""
    paths = RunPaths(folder)
    if not paths.trial.is_file():
        return None
    trial = json.loads(paths.trial.read_text(encoding="utf-8"))
    results = json.loads(paths.summary.read_text(encoding="utf-8")) if paths.summary.is_file() else None
    settings, overrides = trial["settings"], trial["overrides"]
    failure = None if results else trial["failure"]
    return Row(folder, settings, overrides, _choices(overrides, settings), results, failure)


def varied(rows: Sequence[Row]) -> list[str]:
    """The keys and groups that rows differ in."""
    return _differing([row.choices for row in rows])


def _choices(overrides: Sequence[str], settings: Settings) -> Settings:
    """What is overridden, but for what says where a run goes; a setting as it was read, a group's option as text."""
    words = {key: text for key, _, text in (word.partition("=") for word in overrides)}
    return {key: settings.get(key, text) for key, text in words.items() if key.split(".")[0] not in PLACE}


def _differing(every: Sequence[Settings]) -> list[str]:
    """The keys whose values are not all the same."""
    keys = dict.fromkeys(key for own in every for key in own)
    return [key for key in keys if any(own.get(key) != every[0].get(key) for own in every)]


def _folder(sweep: Path, settings: Settings, differing: Sequence[str], named: Settings) -> Path:
    """Of a run: the one that an earlier start has made for these settings, else one that says what is ``named``."""
    learnt = {key: value for key, value in settings.items() if not is_harmless(key)}
    harmless = {key: settings.get(key) for key in differing if key.split(".")[0] not in PLACE}
    key = hashlib.sha256(json.dumps(learnt | harmless, sort_keys=True).encode()).hexdigest()[:10]
    label = "_".join(f"{name.rpartition('.')[2]}-{value}" for name, value in named.items())
    label = re.sub(r"[^\w.+-]+", "-", label)[:80]
    return next(iter(sweep.glob(f"*{key}/")), sweep / (f"{label}_{key}" if label else key))


def _write_trial(folder: Path, overrides: Sequence[str], settings: Settings, failure: str | None) -> None:
    record = {"overrides": overrides, "settings": settings, "failure": failure}
    atomic_write(RunPaths(folder).trial, json.dumps(record, indent=2) + "\n")


def _failure(status: int, terminal: Path) -> str:
    """Why a run has failed, in a line."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    said = terminal.read_text(encoding="utf-8", errors="replace").splitlines() if terminal.is_file() else []
    errors = [line for line in said if line.startswith("k2train: error: ")]
    last = errors[-1].removeprefix("k2train: error: ") if errors else next((s for s in said[::-1] if s.strip()), "")
    return f"ended with status {status}: {last.strip()}"
