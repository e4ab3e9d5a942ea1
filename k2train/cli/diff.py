"""``k2train diff``: whether two runs are the same."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from k2train.checkpoint import folder_of, open_checkpoint, steps
from k2train.config import changed_settings
from k2train.experiments.diff import Difference, Parting, compare_logs, compare_weights
from k2train.paths import RunPaths
from k2train.report import ReportError, Run, read_run
from k2train.status import FAILED, OK


def main(words: Sequence[str]) -> int:
    """Says how far the runs are the same; returns the exit status, 1 if they part."""
    parser = argparse.ArgumentParser(
        prog="k2train diff",
        description=(
            "Whether two runs are the same: bit for bit, to rounding, or from which step and tensor they part. Holds "
            "against each other what both have recorded in metrics.jsonl, but for times, and all tensors of the "
            "checkpoints that both have kept. The exit status is 0 if they are the same, else 1."
        ),
    )
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="relative difference that is rounding (1e-4); 0: only what is equal in all bits is the same",
    )
    arguments = parser.parse_args(words)
    first, second = (read_run(folder.expanduser()) for folder in arguments.runs)
    found = dict(_compare(first, second, arguments.tolerance))
    if not found["steps"].compared:
        raise ReportError(f"{first.folder} and {second.folder} have recorded no step in common")
    for change in changed_settings(first.config, second.config):
        if not change.key.startswith(("name", "runs_dir", "track")):
            print(f"setting      {change.sentence}")
    for what, difference in found.items():
        for line in _lines(difference):
            print(f"{what:<12} {line}")
    parted = min((d.parting for d in found.values() if d.parting), key=lambda p: p.step, default=None)
    if parted:
        print(f"\nThey part at step {parted.step}.")
    elif any(difference.bits for difference in found.values()):
        print(f"\nThe same to rounding ({arguments.tolerance:g}).")
    else:
        print("\nThe same, bit for bit.")
    return FAILED if parted else OK


def _compare(first: Run, second: Run, tolerance: float) -> Iterator[tuple[str, Difference]]:
    """What was compared, and what came of it."""
    yield "steps", compare_logs(first.steps, second.steps, tolerance=tolerance)
    yield "validations", compare_logs(first.validations, second.validations, tolerance=tolerance)
    one, other = (RunPaths(run.folder).checkpoints for run in (first, second))
    common = sorted(set(steps(one)) & set(steps(other)))
    pairs = [(open_checkpoint(folder_of(one, step)), open_checkpoint(folder_of(other, step))) for step in common]
    yield "checkpoints", compare_weights(pairs, tolerance=tolerance)


def _lines(difference: Difference) -> Iterator[str]:
    compared, shown = difference.compared, 4
    if not compared:
        yield "none in common"
        return
    if difference.bits is None:
        yield f"{len(compared)} compared, up to step {compared[-1]}: equal in all bits"
        return
    yield f"{len(compared)} compared, up to step {compared[-1]}; first difference: {_said(difference.bits)}"
    if difference.largest:
        yield f"largest difference: {_said(difference.largest)}"
    for parting in [difference.parting, *difference.others[:shown]] if difference.parting else []:
        yield f"beyond rounding: {_said(parting)}"
    if more := len(difference.others[shown:]):
        yield f"and {more} more at that step"


def _said(parting: Parting) -> str:
    values = ""
    if parting.values and not any(isinstance(value, list | dict) for value in parting.values):
        values = f", {parting.values[0]} and {parting.values[1]}"
    return f"{parting.name} at step {parting.step}{values} (relative {parting.relative:.2g})"
