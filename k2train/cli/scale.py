"""``k2train scale``: laws of loss and settings from sweeps over sizes, tested, and what they foretell."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from k2train.cli.multirun import run_config
from k2train.cli.prepare import console_for_tables
from k2train.experiments.scaling.figures import charts
from k2train.experiments.scaling.page import cell_rows, forecast_lines, held_out_rows, law_lines, verdict
from k2train.experiments.scaling.record import record
from k2train.experiments.scaling.runs import as_csv, read_runs
from k2train.experiments.scaling.study import study
from k2train.paths import atomic_write
from k2train.report import figure
from k2train.status import OK


def main(words: Sequence[str]) -> int:
    """Prints the study, writes its files, and returns the exit status.

    Raises:
        ConfigError: of the target.
        ScalingError: no law can be fitted, or none says anything of the target.
        OSError: a file cannot be read or written.
    """
    arguments = _parser().parse_args(words)
    target = run_config(arguments.target) if arguments.target else None
    sweeps = [path.expanduser() for path in arguments.sweeps]
    folder = arguments.folder or (sweeps[0].parent if sweeps[0].suffix == ".csv" else sweeps[0])
    runs, unfinished = read_runs(sweeps)
    found = study(runs, target)
    if unfinished:
        print(f"left out: {unfinished} runs that are not finished\n")
    _show(cell_rows(found.laws.cells))
    print("\n" + "\n".join(law_lines(found.laws)))
    print("\nWould the others have foretold the largest size?")
    if found.backtest:
        _show(held_out_rows(found.backtest))
    print(verdict(found))
    if found.forecast and target:
        print("\n" + "\n".join(forecast_lines(found.forecast, found.laws, length=target.train.sequence_length)))
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "scale.csv", as_csv(runs))
    atomic_write(folder / "scale.json", json.dumps(record(found), indent=2) + "\n")
    atomic_write(folder / "scale.svg", figure(charts(found)))
    print("\n" + "\n".join(str(folder / f"scale.{kind}") for kind in ("csv", "json", "svg")))
    return OK


def _show(rows: Sequence[Sequence[str]]) -> None:
    head, *lines = rows
    table = Table(box=None, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for cells in lines:
        table.add_row(*cells)
    console_for_tables().print(table, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="k2train scale",
        description=(
            "Takes the best learning rate and batch of each size and number of tokens in sweeps; fits the loss over "
            "parameters, tokens and operations, and the best settings likewise; says whether the smaller sizes would "
            "have foretold the largest; and foretells a target. Writes scale.csv (the runs), scale.json and scale.svg "
            "to DIR. See docs/how-to/scale.md."
        ),
    )
    parser.add_argument(
        "sweeps", nargs="+", type=Path, metavar="SWEEP", help="folders of sweeps, or a scale.csv in their place"
    )
    parser.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="key=value",
        help="overrides of k2train train that make the run to be foretold, all of them",
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write (the first SWEEP's folder)")
    return parser
