"""``k2train train``: one run, from its config to its report."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from k2train.cli.progress import PrepareProgress
from k2train.config import ConfigError, RunConfig, to_dict
from k2train.config.compare import changed_settings
from k2train.paths import RunPaths, atomic_write, cache_dir
from k2train.train.failures import report_failure
from k2train.train.quiet import Quiet, quiet, without_shm_comm

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer
    from k2train.train.validate import HeldOutLoss


def run(config: RunConfig) -> int:
    """Trains, or shows the result of a run that is finished; returns the exit status.

    Raises:
        ConfigError: the config does not fit this number of processes, or the run of this name has other settings.
        OSError: the run's folder cannot be written.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    paths = RunPaths(Path(config.runs_dir).expanduser() / config.name)
    if faults := [*config.check_world(world_size), *_other_settings(config, paths)]:
        raise ConfigError(faults)
    if paths.summary.exists():
        if rank == 0:
            _show_finished(paths)
        return 0
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        atomic_write(paths.config, json.dumps(to_dict(config), indent=2) + "\n")
    log = paths.logs / f"rank-{rank}.log"
    streams = quiet(
        log, rank=rank, world_size=world_size
    )  # to the end of the process: libraries print on their way out
    try:
        _train(config, paths, streams, first=rank == 0)
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error, rank=rank, world_size=world_size, log_path=log, stderr=streams.err)
    return 0


def _other_settings(config: RunConfig, paths: RunPaths) -> list[str]:
    """Why the run of this name is another one, if it is. One that failed before its first step binds nobody."""
    if not (paths.config.exists() and paths.metrics.exists()):
        return []
    if not (changes := changed_settings(json.loads(paths.config.read_text(encoding="utf-8")), to_dict(config))):
        return []
    return [
        f"the run {config.name} in {paths.root} was started with other settings: {'; '.join(changes)}. "
        "Give this one another name, as in name=second, or take the settings back"
    ]


def _show_finished(paths: RunPaths) -> None:
    from k2train.report import Summary, summary_table

    console = Console(file=sys.stdout, highlight=False)
    summary = Summary.from_json(paths.summary.read_text(encoding="utf-8"))
    console.print(f"The run {summary.name} is finished; this is its result. For another run give another name=...")
    console.print(summary_table(summary))


def _train(config: RunConfig, paths: RunPaths, streams: Quiet, *, first: bool) -> None:
    from k2train.comm import close_world, open_world

    # Rank 0 alone, while the others wait for it to open the world; then they find the data prepared.
    manifest = prepare_data(config, streams) if first else None
    from k2train.train.terminal import Terminal
    from k2train.train.track import Tracker
    from k2train.train.trainer import Trainer

    without_shm_comm()
    world = open_world(config.train.device)
    terminal = Terminal(
        name=config.name,
        steps=config.steps,
        log_every=max(1, config.steps // 40),
        stream=streams.out,
        enabled=world.main,
    )
    manifest = manifest or prepare_data(config, None)
    trainer = Trainer(config, manifest, world=world, paths=paths, say=terminal.say)
    with contextlib.ExitStack() as stack:
        listeners: list[Terminal | Tracker] = [terminal]
        if world.main:
            resumed = trainer.progress.step > 0
            tracker = Tracker(
                config.track, to_dict(config), folder=paths.root, name=config.name, resumed=resumed, say=terminal.say
            )
            stack.push(lambda kind, error, where: tracker.finish(failed=kind is not None))
            listeners.append(tracker)
        with terminal:
            result = trainer.train(listeners)
        _report(trainer, result, streams)
    close_world()


def prepare_data(config: RunConfig, streams: Quiet | None) -> Path:
    """The manifest of the run's data, made if need be; says so to the person where ``streams`` are given."""
    from k2train.data import open_dataset, prepare

    with PrepareProgress(streams.out if streams else sys.stdout, enabled=streams is not None) as progress:
        manifest = prepare(config.data, cache=cache_dir(config.data.cache_dir), progress=progress)
    if streams:
        for note in open_dataset(manifest).notes():
            print(note, file=streams.out)
    return manifest


def _report(trainer: Trainer, result: HeldOutLoss, streams: Quiet) -> None:
    """Writes sample, curves and summary, and shows the result; all ranks enter, as experts may live on any."""
    from k2train.data import compressed_sizes
    from k2train.generate import printable, sample_text
    from k2train.report import Summary, draw_curves, summary_table

    config, paths, progress = trainer.config, trainer.paths, trainer.progress
    try:
        text = sample_text(trainer.model, trainer.dataset.tokenizer, config.generate, trainer.world.device)
    except ValueError as error:  # a model that has diverged has a result, but nothing to say
        text = f"no sample: {error}"
    if not trainer.world.main:
        return
    atomic_write(paths.sample, text + "\n")
    compression = compressed_sizes(trainer.dataset.documents("held_out"))
    draw_curves(
        paths.metrics,
        paths.curves,
        tau=config.optim.tau if config.optim.name == "muonclip" else None,
        compression=compression,
    )
    total, active = trainer.parameters()
    tokens = progress.step * config.train.global_batch_size * config.train.sequence_length
    summary = Summary(
        name=config.name,
        folder=str(paths.root),
        steps=progress.step,
        skipped_steps=progress.skipped_steps,
        tokens=tokens,
        elapsed=progress.elapsed,
        tokens_per_second=tokens / progress.elapsed,
        parameters_total=total,
        parameters_active=active,
        validation_loss=result.per_token,
        validation_bits_per_byte=result.bits_per_byte,
        compression=compression,
        max_logit=progress.max_logit if math.isfinite(progress.max_logit) else None,
        clipped_steps=progress.clipped_steps,
        peak_memory=trainer.peak_device_memory() or _peak_memory(),
        world_size=trainer.world.size,
        device=trainer.world.device.type,
        precision=trainer.precision,
    )
    atomic_write(paths.summary, summary.to_json())
    console = Console(file=streams.out, highlight=False)
    console.print(summary_table(summary))
    console.print(f"\nA sample ({paths.sample}):\n", style="dim")
    console.print(printable(text), markup=False)


def _peak_memory() -> int:
    """Bytes that this process had in memory at most; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
