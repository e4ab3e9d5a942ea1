"""The result of a run: as a record that is kept, and as a table that is read."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from k2train.paths import RunPaths
from k2train.units import count, duration, memory


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All that is said of a finished run; ``summary.json`` holds exactly this."""

    name: str
    folder: str  # of the run
    steps: int
    skipped_steps: int  # whose gradient was not finite
    tokens: int  # trained on
    elapsed: float  # seconds in the training loop, all starts together
    tokens_per_second: float
    parameters_total: int
    parameters_active: int  # used for one token
    validation_loss: float  # nats a token, on all of the held-out text
    validation_bits_per_byte: float
    sets: dict[str, dict[str, float]]  # loss and bits_per_byte of each held-out set by its name, if there are several
    compression: dict[str, float]  # bits per byte that compressors need for the held-out text, by their name
    max_logit: float | None  # the largest attention logit of any step; None if there was none
    clipped_steps: int  # in which QK-Clip acted on some head
    peak_memory: int  # bytes, of the largest process; on a GPU the device's
    world_size: int
    device: str
    precision: str

    def to_json(self) -> str:
        """The record as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Summary:
        """The inverse of ``to_json``.

        Raises:
            ValueError: it is no summary, or another version's.
        """
        found = json.loads(text)
        wanted = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(found, dict) or set(found) != wanted:
            differing = sorted(wanted ^ set(found)) if isinstance(found, dict) else "no object"
            raise ValueError(
                f"this is not the summary of a run by this version of k2train ({differing}): delete the file, and the "
                "next start of the run writes a new one"
            )
        return cls(**found)


def summary_table(summary: Summary) -> RenderableType:
    """The result for people: readable in 80 columns, and as plain text where there is no terminal."""
    return Group(
        Text(),
        Text(f"{summary.name} is trained", style="bold"),
        Text(),
        _compression(summary),
        Text(),
        _facts(summary),
        Text(),
        _files(summary),
    )


def _compression(summary: Summary) -> Table:
    """Bits per byte of the model among those of the compressors, the best first."""
    own = summary.validation_bits_per_byte
    rows = [(size, _described(name), name) for name, size in summary.compression.items()]
    rows.append((own, "this model", ""))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("held-out text")
    table.add_column("bits per byte", justify="right")
    table.add_column("")
    for size, label, name in sorted(rows, key=lambda row: row[0]):
        verdict = "" if not name else "beaten" if own < size else "not beaten"
        style = "bold" if not name else "green" if own < size else ""
        table.add_row(label, f"{size:.4f}", verdict, style=style)
    return table


def _described(compressor: str) -> str:
    joined = compressor.endswith(" joined")
    return f"{compressor.removesuffix(' joined')}, {'all files joined' if joined else 'each file by itself'}"


def _facts(summary: Summary) -> Table:
    processes = f"{summary.world_size} process{'es' if summary.world_size > 1 else ''}"
    steps = f"{summary.steps:,}"
    if summary.skipped_steps:
        steps += f", of which {summary.skipped_steps:,} were not applied"
    logit = "none seen" if summary.max_logit is None else f"{summary.max_logit:.1f}"
    clipped = f"{summary.clipped_steps:,} step{'' if summary.clipped_steps == 1 else 's'}"
    return _pairs(
        [
            ("parameters", f"{count(summary.parameters_total)}, {count(summary.parameters_active)} active a token"),
            ("held-out loss", f"{summary.validation_loss:.4f} nats a token"),
            *((f"  {name}", _set(found)) for name, found in summary.sets.items()),
            ("steps", steps),
            ("tokens", f"{count(summary.tokens)} at {count(summary.tokens_per_second)} a second"),
            ("training time", duration(summary.elapsed)),
            ("max logit", f"{logit}; QK-Clip acted in {clipped}"),
            ("peak memory", f"{memory(summary.peak_memory)}{' a process' if summary.world_size > 1 else ''}"),
            ("machine", f"{processes} on {summary.device}, {summary.precision}"),
        ]
    )


def _set(found: dict[str, float]) -> str:
    return f"{found['loss']:.4f}, {found['bits_per_byte']:.4f} bits per byte"


def _files(summary: Summary) -> Table:
    paths = RunPaths(Path(summary.folder))
    named = [
        ("checkpoints", paths.checkpoints),
        ("report", paths.report),
        ("sample", paths.sample),
        ("metrics", paths.metrics),
        ("logs", paths.logs),
    ]
    return _pairs([(label, str(path)) for label, path in named])


def _pairs(rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=13)
    table.add_column(overflow="fold")  # a path must stay whole, if on two lines
    for label, value in rows:
        table.add_row(label, value)
    return table
