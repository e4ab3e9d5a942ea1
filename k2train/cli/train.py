"""``k2train train``: one run, from its config to its report."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from k2train import status
from k2train.cli.progress import PrepareProgress
from k2train.config import ConfigError, RunConfig, changed_settings, refuse_changes, to_dict
from k2train.lock import held_alone
from k2train.paths import RunPaths, atomic_write, cache_dir
from k2train.train.failures import report_failure, report_hang
from k2train.train.hooks import Hook, own_hooks
from k2train.train.phases import build_plan
from k2train.train.quiet import Quiet, import_deepspeed, quiet
from k2train.train.signals import Signals, Stopped
from k2train.train.watchdog import Watchdog, beat

if TYPE_CHECKING:
    from k2train.report import Summary
    from k2train.train.trainer import Trainer
    from k2train.train.validate import Validation

# Seconds for the process of an earlier start, on its way out, to leave the run's folder.
PATIENCE = 5.0
BUSY = "trains here; wait for it to end, stop it, or give this run another name, as in name=second"


def run(config: RunConfig) -> int:
    """Trains, or shows the result of a run that is finished; returns the exit status.

    Raises:
        ConfigError: the config does not fit this number of processes, the schedule's parts do not fit together, a hook
            or an optimizer of one's own is none, a step to profile is not there, or the run of this name has other
            settings.
        OSError: the run's folder cannot be written, or another process trains in it.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    paths = RunPaths(Path(config.runs_dir).expanduser() / config.name)
    if faults := [*config.check_world(world_size), *_other_settings(config, paths)]:
        raise ConfigError(faults)
    steps = build_plan(config).steps
    if late := [step for step in config.profile.steps if step > steps]:
        raise ConfigError([f"profile.steps names {late}, but the run ends with step {steps}: name steps that it has"])
    own = own_hooks(config.train.hooks)
    if config.optim.own:
        from k2train.train.own_optimizer import find_optimizer  # not above: it brings torch

        find_optimizer(config.optim)  # refused before the data is prepared
    if (summary := _finished(config, paths)) is not None:
        if rank == 0:
            _show_finished(summary)
        return status.OK
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    with held_alone(paths.lock, patience=PATIENCE, busy=BUSY) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            paths.exit_status.unlink(missing_ok=True)
            atomic_write(paths.config, json.dumps(to_dict(config), indent=2) + "\n")
        ended = _run(config, paths, own, rank=rank, world_size=world_size)
        if rank == 0:
            with contextlib.suppress(OSError):  # on a full disk whoever reads it finds none: the run has failed
                atomic_write(paths.exit_status, f"{ended}\n")
    return ended


def _run(config: RunConfig, paths: RunPaths, own: Sequence[Hook], *, rank: int, world_size: int) -> int:
    """Trains, whatever happens meanwhile; returns the exit status."""
    log = paths.logs / f"rank-{rank}.log"
    # To the end of the process: libraries print on their way out.
    streams = quiet(log, rank=rank, world_size=world_size)

    def hung(sentence: str) -> NoReturn:
        os._exit(report_hang(sentence, rank=rank, world_size=world_size, log_path=log, stderr=streams.err))

    with Signals() as signals, Watchdog(config.faults.hang_after, stacks=log.with_suffix(".stacks"), hung=hung):
        try:
            _train(config, paths, streams, signals, own)
        except (Exception, Stopped) as error:
            signals.ignore()
            return report_failure(error, rank=rank, world_size=world_size, log_path=log, stderr=streams.err)
    return status.OK


def _other_settings(config: RunConfig, paths: RunPaths) -> list[str]:
    """Why the run of this name is another one, if it is. One that failed before its first step binds nobody."""
    if not (paths.config.exists() and paths.metrics.exists()):
        return []
    changes = changed_settings(json.loads(paths.config.read_text(encoding="utf-8")), to_dict(config))
    refusal = refuse_changes(changes, allowed=config.allow_changed, what=f"the run {config.name} in {paths.root}")
    return [refusal] if refusal else []


def _finished(config: RunConfig, paths: RunPaths) -> Summary | None:
    """The result of the run, if it has taken all the steps that it is to take."""
    from k2train.report import Summary

    if not paths.summary.exists():
        return None
    summary = Summary.from_json(paths.summary.read_text(encoding="utf-8"))
    return summary if summary.steps >= build_plan(config).steps else None


def _show_finished(summary: Summary) -> None:
    from k2train.report import summary_table

    console = Console(file=sys.stdout, highlight=False)
    console.print(f"The run {summary.name} is finished; this is its result. For another run give another name=...")
    console.print(summary_table(summary))


def _train(config: RunConfig, paths: RunPaths, streams: Quiet, signals: Signals, own: Sequence[Hook]) -> None:
    from k2train.comm import close_world, main_first, open_store, open_world

    limit = timedelta(seconds=config.faults.hang_after)
    beat("meeting the other ranks")
    store = open_store(limit)
    waiting = "waiting for rank 0 to prepare the data"
    manifest = main_first(
        store,
        lambda alive: prepare_data(config, streams, alive),
        what="preparing the data",
        limit=limit,
        idle=lambda: beat(waiting),
    )
    beat("starting DeepSpeed")
    import_deepspeed(config.train.device)
    from k2train.cli.samples import Samples
    from k2train.cli.suite import Suite
    from k2train.report import read_run, write_page
    from k2train.train.errors import TooManyRewinds
    from k2train.train.incidents import Incidents
    from k2train.train.metrics import MetricsFile
    from k2train.train.profile import Profiler
    from k2train.train.terminal import Terminal
    from k2train.train.track import build_tracker
    from k2train.train.trainer import Trainer

    world = open_world(config.train.device, store=store, timeout=2 * limit)  # the watchdog, with its stacks, is first
    steps = build_plan(config).steps
    terminal = Terminal(
        name=config.name, steps=steps, log_every=max(1, steps // 40), stream=streams.out, enabled=world.main
    )
    beat("building the model")
    samples = Samples(config.generate, paths.samples, every=config.generate.every)
    suite = Suite(config.validate, config.generate)
    hooks = [terminal, samples, suite, Profiler(config.profile.steps, paths.profile), *own]
    if world.main:
        tracker = build_tracker(config.track, to_dict(config), folder=paths.root, name=config.name, say=terminal.say)
        hooks += [MetricsFile(paths.metrics, say=terminal.say), Incidents(paths.incidents, say=terminal.say), tracker]
    trainer = Trainer(config, manifest, world=world, paths=paths, say=terminal.say, hooks=hooks)
    with terminal, signals.deferred():
        try:
            result = trainer.train(received=lambda: signals.received)
        except TooManyRewinds:
            if world.main:
                write_page(paths.report, [read_run(paths.root)])
                terminal.say(f"the report: {paths.report}")
            raise
    _report(trainer, result, streams)
    close_world()


def prepare_data(config: RunConfig, streams: Quiet, alive: Callable[[], None]) -> Path:
    """The manifest of the run's data, made if need be; rank 0 shows how far it is.

    Args:
        config: of the run.
        streams: the person's.
        alive: called whenever the work gets on.
    """
    from k2train.data import open_dataset, prepare

    main = os.environ.get("RANK", "0") == "0"
    with PrepareProgress(streams.out, enabled=main) as show:

        def progress(stage: str, done: int, total: int) -> None:
            beat(f"preparing the data ({stage})")
            alive()
            show(stage, done, total)

        manifest = prepare(config.data, cache=cache_dir(config.data.cache_dir), progress=progress)
    if main:
        for note in open_dataset(manifest).notes():
            print(note, file=streams.out)
    return manifest


def _report(trainer: Trainer, result: Validation, streams: Quiet) -> None:
    """Writes sample, summary and report, and shows the result; all ranks enter, as experts may live on any."""
    from k2train.data import compressed_sizes
    from k2train.generate import printable, sample_text
    from k2train.report import Summary, read_run, summary_table, write_page

    config, paths, progress = trainer.config, trainer.paths, trainer.progress
    beat("writing a sample")
    try:
        text = sample_text(trainer.model, trainer.dataset.tokenizer, config.generate, trainer.world.device)
    except ValueError as error:  # a model that has diverged has a result, but nothing to say
        text = f"no sample: {error}"
    if not trainer.world.main:
        return
    beat("writing the report", limited=False)
    atomic_write(paths.sample, text + "\n")
    compression = compressed_sizes(trainer.dataset.documents("held_out"))
    total, active = trainer.parameters()
    tokens = trainer.plan.tokens
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
        validation_loss=result.total.per_token,
        validation_bits_per_byte=result.total.bits_per_byte,
        sets=result.per_set(),
        compression=compression,
        max_logit=progress.max_logit if math.isfinite(progress.max_logit) else None,
        clipped_steps=progress.clipped_steps,
        peak_memory=trainer.peak_memory(),
        world_size=trainer.world.size,
        device=trainer.world.device.type,
        precision=trainer.precision,
    )
    atomic_write(paths.summary, summary.to_json())
    write_page(paths.report, [read_run(paths.root)])
    console = Console(file=streams.out, highlight=False)
    console.print(summary_table(summary))
    console.print(f"\nA sample ({paths.sample}):\n", style="dim")
    console.print(printable(text), markup=False)
