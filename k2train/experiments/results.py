"""A reproduction's results as files: verdict.md, figure.svg, and runs.csv with a line for each run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k2train.experiments.reproduction import Findings, Reproduction, Trial, Values
from k2train.experiments.statistics import interval
from k2train.experiments.sweep import varied
from k2train.paths import atomic_write
from k2train.report import figure

RESULTS = (
    *("validation_loss", "validation_bits_per_byte", "max_logit", "clipped_steps", "skipped_steps"),
    *("steps", "tokens", "parameters_total", "parameters_active", "elapsed", "device", "precision"),
)


def write_results(
    folder: Path, name: str, reproduction: Reproduction, trials: Sequence[Trial], origin: Mapping[str, Any]
) -> Findings:
    """Reads the findings off the runs and writes all files.

    Args:
        folder: is made if it is not there.
        name: of the reproduction.
        reproduction: with that name.
        trials: all of its runs, finished.
        origin: what else is to be told, as the command and the commit.

    Raises:
        OSError: a file cannot be written.
    """
    findings = reproduction.analyse(trials)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "runs.csv", runs_csv(trials))
    atomic_write(folder / "figure.svg", figure([chart for chart in findings.charts if chart]))
    atomic_write(folder / "verdict.md", page(name, reproduction, findings, origin))
    return findings


def page(name: str, reproduction: Reproduction, findings: Findings, origin: Mapping[str, Any]) -> str:
    """verdict.md."""
    expected = {expectation.number: expectation for expectation in reproduction.expected}
    seeds = sorted({seed for values in findings.numbers.values() for seed in values})
    head = [*(f"seed {seed}" for seed in seeds), "mean, 95 %"]
    judged = [
        [f"{key} {expected[key].bound}", *_cells(values, seeds), expected[key].judge(values).value]
        for key, values in findings.numbers.items()
        if key in expected
    ]
    others = [[key, *_cells(values, seeds)] for key, values in findings.numbers.items() if key not in expected]
    return "\n".join(
        [
            f"# {name}: {reproduction.verdict(findings).value}",
            "",
            f"**Claim.** {reproduction.claim}",
            "",
            f"**Here.** {reproduction.here}",
            "",
            *_table(["expected", *head, ""], judged),
            "",
            *_table(["also seen", *head], others),
            "",
            "![Figure](figure.svg)",
            "",
            *(f"- {key}: {value}" for key, value in origin.items()),
            "- every run: [runs.csv](runs.csv)",
            "",
        ]
    )


def runs_csv(trials: Sequence[Trial]) -> str:
    """A line for each run: the settings that differ between any, and the results."""
    keys = varied([trial.row for trial in trials])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, *RESULTS])
    for trial in trials:
        writer.writerow([*(trial.row.choices.get(key) for key in keys), *(trial.result[key] for key in RESULTS)])
    return text.getvalue()


def _cells(values: Values, seeds: Sequence[int]) -> list[str]:
    """Of a row: the value of each seed, and the mean over seeds with its interval."""
    mean = interval(list(values.values()))
    spread = "" if math.isnan(mean.half) else f" ± {mean.half:.2g}"
    return [*(f"{values[seed]:.4g}" if seed in values else "" for seed in seeds), f"{mean.mean:.4g}{spread}"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """In Markdown; numbers stand on the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]
