"""``k2train table``: the table and the figures of a sweep."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table as RichTable

from k2train.cli.prepare import console_for_tables
from k2train.experiments.sweep import Row, read_rows
from k2train.experiments.table import RESULTS, figures, tabulate
from k2train.paths import atomic_write
from k2train.report import Section, write_sheet
from k2train.status import FAILED, OK


def main(words: Sequence[str]) -> int:
    """Prints the table, writes it with its figures, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="k2train table",
        description=(
            "The settings in which the runs of a sweep differ, and their results: means over seeds with 95 %% "
            "intervals of Student's t. Writes SWEEP/table.csv and SWEEP/table.html, which has figures too. It may "
            "be finished, running or dead."
        ),
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="the folder of a sweep")
    parser.add_argument(
        "--results",
        default=",".join(RESULTS),
        metavar="KEY,KEY",
        help="which numbers of summary.json are shown (%(default)s)",
    )
    arguments = parser.parse_args(words)
    rows = read_rows(arguments.sweep.expanduser())
    if not rows:
        print(
            f"k2train: error: {arguments.sweep} holds no runs of a sweep; `k2train train --multirun` makes one",
            file=sys.stderr,
        )
        return FAILED
    show_table(arguments.sweep.expanduser(), rows, arguments.results.split(","))
    return OK


def show_table(folder: Path, rows: Sequence[Row], results: Sequence[str] = RESULTS) -> None:
    """Prints the table of a sweep, and writes it to its folder with its figures."""
    table = tabulate(rows, results)
    head, *lines = table.cells()
    shown = RichTable(box=None, pad_edge=False)
    for name in head:
        shown.add_column(name.replace("validation_", "").replace("_", " "), overflow="fold")
    for cells in lines:
        shown.add_row(*cells)
    console_for_tables().print(shown, markup=False)
    atomic_write(folder / "table.csv", table.as_csv())
    sections = [
        Section(title="Results", head=head, rows=[("", cells) for cells in lines]),
        Section(title="Figures", charts=figures(table)),
    ]
    write_sheet(folder / "table.html", folder.name, [s for s in sections if s.rows or s.charts])
    print(f"\n{folder / 'table.csv'}\n{folder / 'table.html'}")
