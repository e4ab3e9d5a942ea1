"""``k2train watch``: the panel of a run that another process trains, or has trained."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from k2train.config import RunConfig, parse
from k2train.paths import RunPaths
from k2train.report.records import (
    Tail,
    in_order,
    is_incident,
    is_validation,
    read_config,
    read_lines,
    run_state,
    warning,
)
from k2train.status import OK
from k2train.train.phases import build_plan
from k2train.train.terminal import Terminal

EVERY = 0.5  # seconds between two looks
FIRST = 3  # warnings of what was before


def main(words: Sequence[str]) -> int:
    """Follows the run until it ends or the person leaves; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="k2train watch",
        description=(
            "Follows a run from another terminal, until it ends. It only reads; Ctrl-C leaves, and the run goes on."
        ),
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    folder = parser.parse_args(words).run.expanduser()
    with contextlib.suppress(KeyboardInterrupt):
        watch(folder, sys.stdout)
    return OK


def watch(folder: Path, stream: TextIO) -> None:
    """Shows what the run's files say, as it comes.

    Raises:
        ReportError: the folder is no run.
        ConfigError: it is one of another version of k2train.
    """
    paths = RunPaths(folder)
    config = parse(RunConfig, read_config(folder))
    steps = build_plan(config).steps
    elapsed = 0.0  # of training, by the newest record: the clock of speed and time left
    terminal = Terminal(
        name=config.name, steps=steps, log_every=max(1, steps // 40), stream=stream, clock=lambda: elapsed
    )
    metrics, damaged = Tail(paths.metrics), 0
    with terminal:
        while True:
            state = run_state(folder)  # before the look at the files, so that the last records are not missed
            anew, text = metrics.read()
            records, torn = read_lines(text)
            damaged += torn
            if anew:
                done, validations, _ = in_order(records)
                elapsed = done[-1]["elapsed"] if done else 0.0
                terminal.catch_up(done, validations)
            strange = [(record["step"], found) for record in records if (found := warning(record))]
            for step, found in strange[-FIRST:] if anew else strange:
                terminal.warn(f"step {step:,}: {found}")
            for record in () if anew else records:
                if is_validation(record):
                    terminal.validation(record)
                elif not is_incident(record):
                    elapsed = record["elapsed"]
                    terminal.log(record)
            if state != "running":
                break
            time.sleep(EVERY)
        if damaged:
            terminal.say(f"{damaged:,} damaged line{'' if damaged == 1 else 's'} left out")
        terminal.say(f"{config.name}: {state}")
