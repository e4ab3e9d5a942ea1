"""``k2train train --multirun``: a run for each combination of the values that are given for a key."""

from __future__ import annotations

import argparse
import functools
import itertools
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from k2train.cli.commands import TRAIN
from k2train.cli.compose import Span, compose, swept
from k2train.cli.table import show_table
from k2train.config import ConfigError, RunConfig, parse
from k2train.experiments import sweep
from k2train.experiments.launch import local
from k2train.experiments.sweep import Sweep
from k2train.paths import RunPaths
from k2train.status import FAILED, OK, of_signal


def run_config(overrides: Sequence[str], own_dirs: Sequence[Path] = ()) -> RunConfig:
    """The config of ``k2train train`` with these overrides.

    Args:
        overrides: ``group=option`` and ``key=value``.
        own_dirs: folders searched for options after the shipped one.

    Raises:
        ConfigError: with all faults.
    """
    return parse(RunConfig, compose(TRAIN, overrides, own_dirs))


def main(words: Sequence[str]) -> int:
    """Runs what is not finished, shows the table and returns the exit status: 1 if a run has failed.

    Raises:
        ConfigError: of one of the runs; before any of them is started.
    """
    arguments = _parser().parse_intermixed_args(words)
    own_dirs = [folder.expanduser().resolve() for folder in arguments.config_dir]
    compose = functools.partial(run_config, own_dirs=own_dirs)
    runs = combinations(arguments.overrides, own_dirs)
    config = compose(runs[0])
    folder = Path(config.runs_dir).expanduser() / config.name
    if RunPaths(folder).config.exists():
        raise ConfigError([f"{folder} is a run: give the sweep another name, as in name=sweep"])
    command = [*sweep.TRAIN, *(f"--config-dir={own}" for own in own_dirs)]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    rows = Sweep(folder, runs, compose=compose, command=command).run(local(arguments.jobs), tell=_tell)
    show_table(folder, rows)
    return OK if all(row.results is not None for row in rows) else FAILED


def combinations(words: Sequence[str], own_dirs: Sequence[Path] = ()) -> list[list[str]]:
    """The overrides of each run: all combinations of the values, the last word's changing fastest.

    Raises:
        ConfigError: a word stands for a span of numbers, which has no end of values.
    """
    every = []
    for word in words:
        values = swept(word, own_dirs)
        if isinstance(values, Span):
            raise ConfigError([f"{word}: a sweep takes values one by one; give them, as in 0.01,0.02"])
        every.append(values)
    return [list(choice) for choice in itertools.product(*every)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="k2train train --multirun",
        description=(
            "A run for each combination of values: key=a,b or key=range(1,5) or group=glob(*), in Hydra's grammar. "
            "Each has its folder in runs_dir/name, and is found again there by its config: the same command goes on "
            "with a sweep that was stopped, and skips what is finished. A run that fails does not stop the others. At "
            "the end comes the table that `k2train table` makes. The runs are a group of wandb (track.group)."
        ),
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for k2train train, with several values")
    parser.add_argument("-m", "--multirun", action="store_true", help="what makes it a sweep")
    parser.add_argument(
        "--jobs", type=_whole, default=1, metavar="N", help="runs at a time, which share the machine (1)"
    )
    parser.add_argument(
        "--config-dir", type=Path, action="append", default=[], metavar="DIR", help="look for options in DIR too"
    )
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def _tell(line: str) -> None:
    print(line, flush=True)


def _end(number: int, _: object) -> NoReturn:
    sys.exit(of_signal(number))
