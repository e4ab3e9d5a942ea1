"""``k2train report``: a page of one run, or of several side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from k2train.paths import RunPaths
from k2train.report import read_run, write_page


def main(words: Sequence[str]) -> int:
    """Writes the page, says where it is and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="k2train report",
        description=(
            "One HTML page that needs nothing but itself: summary, curves, incidents, samples and settings. Runs may "
            "be finished, running or dead."
        ),
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--to", type=Path, metavar="FILE", help="default: report.html, of a single run in its folder")
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="the axis of the charts")
    arguments = parser.parse_args(words)
    runs = [read_run(folder.expanduser()) for folder in arguments.runs]
    for run in runs:
        if run.damaged:
            lines = "1 damaged line is" if run.damaged == 1 else f"{run.damaged:,} damaged lines are"
            print(f"k2train: {run.folder}: {lines} left out", file=sys.stderr)
    page = arguments.to or (RunPaths(runs[0].folder).report if len(runs) == 1 else Path("report.html"))
    write_page(page, runs, x=arguments.x)
    print(page)
    return 0
