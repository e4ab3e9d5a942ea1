"""``k2train train --multirun``: a run for each combination of the values that are given for a key."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from k2train.cli.commands import TRAIN
from k2train.cli.compose import Span, compose, swept
from k2train.cli.table import show_table
from k2train.config import ConfigError, RunConfig, is_harmless, parse
from k2train.experiments import sweep
from k2train.experiments.launch import Launcher, local
from k2train.experiments.sweep import Row, Sweep, read_rows
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
        ConfigError: of one of the runs, before any of them is started; or an option's.
    """
    arguments = _parser().parse_intermixed_args(words)
    own_dirs = [folder.expanduser().resolve() for folder in arguments.config_dir]
    values = {word: swept(word, own_dirs) for word in arguments.overrides}
    fixed = [found[0] for found in values.values() if not isinstance(found, Span)]
    compose = functools.partial(run_config, own_dirs=own_dirs)
    config = compose(fixed)
    folder = Path(config.runs_dir).expanduser() / config.name
    if RunPaths(folder).config.exists():
        raise ConfigError([f"{folder} is a run: give the sweep another name, as in name=sweep"])
    launch = _launcher(folder, arguments.jobs, arguments.slurm)
    command = [*sweep.TRAIN, *(f"--config-dir={own}" for own in own_dirs)]

    def run(runs: Sequence[Sequence[str]]) -> list[Row]:
        return Sweep(folder, runs, compose=compose, command=command).run(launch, tell=_tell)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    if arguments.trials:
        _search(folder, values, arguments, run)
        rows = read_rows(folder)
    else:
        rows = run(combinations(values))
    show_table(folder, rows)
    return OK if all(row.results is not None for row in rows) else FAILED


def combinations(values: Mapping[str, Sequence[str] | Span]) -> list[list[str]]:
    """The overrides of each run: all combinations of what the words stand for, the last one's changing fastest.

    Raises:
        ConfigError: a word stands for a span of numbers, which has no end of values.
    """
    if spans := [word for word, found in values.items() if isinstance(found, Span)]:
        raise ConfigError([f"{word}: say how many values are to be tried, as in --trials 20" for word in spans])
    lists = [found for found in values.values() if not isinstance(found, Span)]
    return [list(choice) for choice in itertools.product(*lists)]


def _launcher(folder: Path, jobs: int, parameters: str | None) -> Launcher:
    if parameters is None:
        return local(jobs)
    _need("submitit", "--slurm")
    from k2train.experiments.slurm import slurm

    pairs = [pair.partition("=") for pair in parameters.split(",") if pair]
    try:
        return slurm(folder / "slurm", jobs, {key: int(text) if text.isdecimal() else text for key, _, text in pairs})
    except (ValueError, RuntimeError) as error:  # submitit's sentences on its parameters, and on a missing SLURM
        raise ConfigError([f"--slurm {parameters}: {' '.join(str(error).split())}"]) from error


def _search(
    folder: Path,
    values: Mapping[str, Sequence[str] | Span],
    arguments: argparse.Namespace,
    run: Callable[[Sequence[Sequence[str]]], list[Row]],
) -> None:
    _need("optuna", "--trials")
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    from k2train.experiments.search import search

    space: dict[str, CategoricalDistribution | FloatDistribution] = {}
    fixed: list[str] = []
    for word, found in values.items():
        key = word.partition("=")[0]
        if isinstance(found, Span):
            space[key] = FloatDistribution(found.low, found.high, log=found.log)
        elif len(found) > 1:
            space[key] = CategoricalDistribution([one.removeprefix(f"{key}=") for one in found])
        else:
            fixed += found
    if harmless := [key for key in space if is_harmless(key)]:
        raise ConfigError([f"{key} leaves what is learnt as it is: there is nothing to search for" for key in harmless])
    search(
        folder,
        space,
        trials=arguments.trials,
        batch=arguments.jobs,
        run=lambda trials: run([[*fixed, *(f"{key}={value}" for key, value in one.items())] for one in trials]),
    )


def _need(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError([f"{option} needs {package}: pip install 'k2train[sweep]'"])


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
        "--slurm",
        metavar="KEY=VALUE,...",
        help="as jobs of a SLURM cluster, with settings of sbatch, as in partition=gpu,time=600,gpus_per_node=1",
    )
    parser.add_argument(
        "--trials",
        type=_whole,
        metavar="N",
        help="search by Optuna instead: N runs in all, of values that make the held-out loss small; a number may also "
        "be given as interval(0.01,0.1) or tag(log,interval(0.001,0.1))",
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
