"""``k2train reproduce``: runs that test a claim of a report, and what they say of it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from k2train.cli.multirun import run_config
from k2train.experiments.launch import local
from k2train.experiments.reproduction import Trial
from k2train.experiments.reproductions import REPRODUCTIONS
from k2train.experiments.results import write_results
from k2train.experiments.sweep import Sweep
from k2train.report import read_run
from k2train.status import FAILED, OK
from k2train.train.revision import revision


def main(words: Sequence[str]) -> int:
    """Runs what is not finished, writes the results and says the verdict; returns the exit status."""
    arguments = _arguments(words)
    reproduction = REPRODUCTIONS[arguments.name]
    folder = arguments.runs_dir.expanduser() / (f"{arguments.name}-quick" if arguments.quick else arguments.name)
    runs = [[*overrides, *arguments.overrides] for overrides in reproduction.runs(arguments.quick)]
    sweep = Sweep(folder / "runs", runs, compose=run_config)
    print(f"{arguments.name}: {len(runs)} runs, {arguments.jobs} at a time, in {folder}", flush=True)
    rows = sweep.run(local(arguments.jobs), tell=lambda line: print(line, flush=True))
    if lacking := sum(row.results is None for row in rows):
        print(
            f"k2train: error: {lacking} of {len(rows)} runs are not finished, so that there is no verdict: their last "
            "words are above; the same command tries them again",
            file=sys.stderr,
        )
        return FAILED
    trials = [Trial(row, read_run(row.folder)) for row in rows]
    code = " ".join(revision().values())
    origin = {"command": f"`{shlex.join(['k2train', 'reproduce', *words])}`", "code at the verdict": code}
    findings = write_results(folder, arguments.name, reproduction, trials, origin)
    print()
    for expectation in reproduction.expected:
        values = findings.numbers[expectation.number]
        said = ", ".join(f"{value:.4g}" for value in values.values())
        print(f"{expectation.judge(values).value}: {expectation.number} {expectation.bound}: {said}")
    print(f"\n{arguments.name}: {reproduction.verdict(findings).value}\n{folder / 'verdict.md'}")
    return OK


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="k2train reproduce",
        description=(
            "Trains small models that test a claim about MuonClip or K2's architecture, each with several seeds, and "
            "says whether it holds, does not hold or is not shown at this scale, against what was stated before: "
            "verdict.md, figure.svg and runs.csv in DIR/NAME or DIR/NAME-quick. The same command goes on where it was "
            "stopped."
        ),
    )
    parser.add_argument("name", choices=REPRODUCTIONS, metavar="NAME", help=", ".join(REPRODUCTIONS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, as in train.device=cpu")
    parser.add_argument("--quick", action="store_true", help="a form of minutes on two cores; else it wants a GPU")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="runs/reproduce")
    return parser.parse_intermixed_args(words)
