"""``k2train audit``: how each parameter is updated, and whether one step of the run did just that."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from k2train.cli.train import prepare_data
from k2train.config import ConfigError, RunConfig
from k2train.paths import RunPaths
from k2train.train.failures import report_failure
from k2train.train.quiet import Quiet, import_deepspeed, quiet
from k2train.units import memory

if TYPE_CHECKING:
    from muonclip.audit import Exchanged

    from k2train.train.audit import Placement, Range, Row
    from k2train.train.trainer import Trainer

PLACES = 3  # of a parameter that are shown
PIPED_WIDTH = 120  # columns where the terminal does not say


def run(config: RunConfig) -> int:
    """Takes the first step of the run at its peak learning rate and throws it away; 0 if each update was right.

    Raises:
        ConfigError: the config does not fit this number of processes.
        OSError: the run's folder cannot be written.
    """
    if config.optim.own:
        raise ConfigError([f"optim.name={config.optim.name} is your own: there is no theory to hold its step against"])
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if faults := [*config.check_world(world_size)]:
        raise ConfigError(faults)
    # Without warm-up: after it, an update is large against the rounding of the weights that it is read from.
    schedule = dataclasses.replace(
        config.schedule,
        warmup_steps=None,
        warmup_tokens=None,
        decay_fraction=None,
        decay_steps=None,
        decay_tokens=None,
        decay_shape=None,
        final_lr_ratio=None,
    )
    config = dataclasses.replace(config, schedule=schedule)
    # Apart from the run of this name, which may not have begun, or be half done.
    paths = RunPaths(Path(config.runs_dir).expanduser() / config.name / "audit")
    log = paths.logs / f"rank-{rank}.log"
    streams = quiet(log, rank=rank, world_size=world_size)
    try:
        return _audit(config, paths, streams)
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error, rank=rank, world_size=world_size, log_path=log, stderr=streams.err)


def _audit(config: RunConfig, paths: RunPaths, streams: Quiet) -> int:
    from muonclip import MuonClip
    from muonclip.audit import exchanges

    from k2train.comm import close_world, main_first, open_store, open_world

    limit = timedelta(seconds=config.faults.hang_after)
    store = open_store(limit)
    manifest = main_first(
        store, lambda alive: prepare_data(config, streams, alive), what="preparing the data", limit=limit
    )
    import_deepspeed(config.train.device)
    from k2train.train.audit import audit, placements
    from k2train.train.trainer import Trainer

    world = open_world(config.train.device, store=store, timeout=limit)

    def say(text: str) -> None:
        if world.main:
            print(text, file=streams.out)

    trainer = Trainer(config, manifest, world=world, paths=paths, say=say)
    assert isinstance(trainer.optimizer, MuonClip)
    where = placements(trainer)
    rows = audit(trainer)
    if world.main:
        console = Console(file=streams.out, highlight=False)
        if not console.is_terminal:
            console = Console(file=streams.out, highlight=False, width=PIPED_WIDTH)
        if world.size > 1:
            console.print(placement_table(where))
            console.print(exchange_table(exchanges(trainer.optimizer)))
        show(trainer, rows, console)
    close_world()
    return 1 if any(row.fault for row in rows) else 0


def show(trainer: Trainer, rows: list[Row], console: Console) -> None:
    """Prints both tables and the verdict."""
    clip = trainer.clip
    console.print(_rule_table(rows))
    console.print(
        "Muon: W <- W - lr (scale O + decay W), scale = 0.2 sqrt(max(m, n)), O the orthogonalised momentum.\n",
        style="dim",
    )
    console.print(_step_table(rows))
    console.print(
        "Theory: Newton-Schulz's polynomial on the singular values of the momentum, and AdamW's formula, in float64.\n"
        "Ranges are over the matrices of a parameter. RMS is that of the update before the learning rate.\n",
        style="dim",
    )
    acts = f"tau {clip.tau:g}, alpha {clip.alpha:g}" if clip.scales_weights else "off, watching only"
    heads, clipped = clip.max_logits.numel(), int((clip.gamma < 1).sum())
    console.print(
        f"QK-Clip: {acts}; largest logit {float(clip.max_logits.max()):.3g}; {clipped} of {heads} heads clipped"
    )
    matrices, wrong = sum(row.matrices for row in rows), [row for row in rows if row.fault]
    for row in wrong:
        console.print(f"{row.rule.name}: {row.fault}", markup=False)
    if wrong:
        console.print(f"[bold red]{len(wrong)} of {len(rows)} parameters were not updated as they should be[/]")
    else:
        console.print(
            f"{len(rows)} parameters and {matrices} orthogonalised matrices: each updated as it should be, once"
        )


def placement_table(found: Iterable[Placement]) -> Table:
    """Which rank holds what of each parameter, and who orthogonalises its matrices."""
    table = _table("parameter", "rank [start, stop) of the elements", "orthogonalised by", title="Where weights lie")
    for one in found:
        parts = [f"{rank} [{start}, {stop})" for rank, start, stop in one.intervals]
        runs = [(rank, len(list(equal))) for rank, equal in itertools.groupby(one.owners)]
        owners = [f"{rank} x {number}" if number > 1 else str(rank) for rank, number in runs]
        table.add_row(one.name, escape(_some(parts)), _some(owners))
    return table


def _some(parts: list[str]) -> str:
    """All of a few, and the ends of many."""
    return ", ".join(parts) if len(parts) <= PLACES else f"{', '.join(parts[: PLACES - 1])}, ... {parts[-1]}"


def exchange_table(found: Iterable[Exchanged]) -> Table:
    """How matrices that are cut over ranks come together; of experts, those of the first rank's group."""
    table = _table("role", "matrices", "on one rank", "travel", "rounds", title="Who orthogonalises what")
    for column in ("work, max / mean", "sent a rank, mean", "max", "held, max"):
        table.add_column(column, overflow="fold")
    for one in found:
        travel = sum(matrix.travels for matrix in one.matrices)
        sent = [traffic.sent for traffic in one.traffic]
        table.add_row(
            one.role,
            str(len(one.matrices)),
            str(len(one.matrices) - travel),
            str(travel),
            str(one.rounds),
            f"{max(one.costs) * len(one.costs) / sum(one.costs):.3f}",
            memory(sum(sent) // len(sent)),
            memory(max(sent)),
            memory(max(traffic.buffers for traffic in one.traffic)),
        )
    return table


def _rule_table(rows: Iterable[Row]) -> Table:
    table = _table("parameter", "role", "shape", "rule", "lr", "decay", title="How each parameter is updated")
    for row in rows:
        rule = row.rule
        if rule.algorithm == "muon":
            stacked = f"{row.matrices} x " if row.matrices > 1 else ""
            shape, how = f"{stacked}{list(rule.matrices[0])}", f"Muon, scale {rule.scales[0]:.3g}"
        else:
            shape, how = str(list(rule.shape)), "AdamW"
        table.add_row(rule.name, rule.role, escape(shape), how, f"{rule.lr:g}", f"{rule.weight_decay:g}")
    return table


def _step_table(rows: Iterable[Row]) -> Table:
    table = _table("parameter", "singular values", "theory", "RMS", "theory", "verdict", title="What one step did")
    for row in rows:
        table.add_row(
            row.rule.name,
            _text(row.singular, 2),
            _text(row.expected_singular, 2),
            _text(row.rms, 3),
            _text(row.expected_rms, 3),
            "[bold red]wrong[/]" if row.fault else "ok",
        )
    return table


def _table(*columns: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _text(values: Range | None, digits: int) -> str:
    if values is None:
        return ""
    low, high = (f"{v:.{digits}f}" if math.isfinite(v) else str(v) for v in values)
    return low if low == high else f"{low} to {high}"
