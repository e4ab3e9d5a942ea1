"""``k2train incidents``: the steps of a run that were out of the ordinary, and what became of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from k2train.cli.prepare import console_for_tables
from k2train.paths import RunPaths, incident_name
from k2train.report.records import in_order, read_config, read_lines


def main(words: Sequence[str]) -> int:
    """Prints the table and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="k2train incidents",
        description="The steps of a run that were out of the ordinary, finished or not. See docs/monitor.md.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    folder = parser.parse_args(words).run.expanduser()
    read_config(folder)  # or it is no run
    paths, console = RunPaths(folder), console_for_tables()
    text = paths.metrics.read_text(encoding="utf-8", errors="replace") if paths.metrics.is_file() else ""
    _, _, found = in_order(read_lines(text)[0])
    if not found:
        console.print("no step of this run was out of the ordinary")
        return 0
    console.print(table(found))
    console.print(f"Each has a folder in {paths.incidents}, with the documents of its step.", markup=False)
    return 0


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """An incident or a warning a row."""
    made = Table(box=None, pad_edge=False)
    for column in ("step", "what became of it", "what was found", "worst document"):
        made.add_column(column, overflow="fold")
    for record in records:
        found = record["incident"]
        became = f"rewound to {found['to']:,}" if found["action"] == "rewound" else found["action"]
        worst = found.get("document") or {}
        named = f"{worst['name']}, {worst['origin']}" if worst else ""
        made.add_row(incident_name(record), became, escape(found["sentence"]), escape(named))
    return made
