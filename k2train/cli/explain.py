"""``k2train explain``: a step of a run, taken again from the checkpoint before it, bit for bit."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from k2train.cli.train import prepare_data
from k2train.config import ConfigError, RunConfig, parse
from k2train.paths import RunPaths
from k2train.report.records import in_order, read_config, read_lines
from k2train.train.failures import report_failure
from k2train.train.phases import build_plan
from k2train.train.quiet import Quiet, import_deepspeed, quiet


def main(words: Sequence[str]) -> int:
    """Takes the step again; 0 if the replay was the run to the last bit, as far as it has recorded it.

    Raises:
        ConfigError: the run has no such step, or was cut over another number of processes.
    """
    parser = argparse.ArgumentParser(
        prog="k2train explain",
        description=(
            "Goes on from the newest checkpoint before a step, through it, and writes its folder in RUN/incidents: "
            "documents with their losses and text, heads, experts. A run of several processes is replayed by as "
            "many: torchrun --standalone --nproc_per_node N -m k2train explain RUN --step STEP"
        ),
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    parser.add_argument("--step", type=int, required=True, help="as metrics.jsonl counts them: the first is 1")
    arguments = parser.parse_args(words)
    folder, step = arguments.run.expanduser(), arguments.step
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    config = parse(RunConfig, read_config(folder))
    plan = build_plan(config)
    if not 1 <= step <= plan.steps:
        raise ConfigError([f"--step {step}: the run {config.name} has the steps 1 to {plan.steps}"])
    if faults := [*config.check_world(world_size)]:
        raise ConfigError(faults)
    aside = RunPaths(folder / "explain")
    log = aside.logs / f"rank-{rank}.log"
    streams = quiet(log, rank=rank, world_size=world_size)
    try:
        return _explain(config, RunPaths(folder), aside, step, streams)
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error, rank=rank, world_size=world_size, log_path=log, stderr=streams.err)


def _explain(config: RunConfig, paths: RunPaths, aside: RunPaths, step: int, streams: Quiet) -> int:
    from k2train.checkpoint import folder_of, steps
    from k2train.comm import close_world, main_first, open_store, open_world, together

    limit = timedelta(seconds=config.faults.hang_after)
    store = open_store(limit)
    manifest = main_first(
        store, lambda alive: prepare_data(config, streams, alive), what="preparing the data", limit=limit
    )
    import_deepspeed(config.train.device)
    from k2train.train.incidents import TEXT, write_incident
    from k2train.train.replay import compared, replay
    from k2train.train.trainer import Trainer

    world = open_world(config.train.device, store=store, timeout=limit)
    with together():
        if world.main and paths.rewinds.exists():
            shutil.copy(paths.rewinds, aside.rewinds)
    start = next((done for done in steps(paths.checkpoints) if done < step), None)
    # Where none precedes the step, the run is taken again from its beginning.
    resume = "never" if start is None else str(folder_of(paths.checkpoints, start))

    def say(text: str) -> None:
        if world.main:
            print(text, file=streams.out, flush=True)

    config = dataclasses.replace(config, resume=resume)
    found = replay(Trainer(config, manifest, world=world, paths=aside, say=say), step)
    text = paths.metrics.read_text(encoding="utf-8", errors="replace")
    done, _, told = in_order(read_lines(text)[0])
    # Neither warnings, nor steps that the run has gone back from and taken anew.
    incidents = [record for record in told if "findings" in record["incident"] and "rewind" not in record["incident"]]
    number, differing = compared(found, done, incidents)
    if world.main:
        folder = paths.incidents / str(step)
        # What became of the step is what the run has recorded of it, not the replay.
        own = next((record for record in incidents if record["step"] == step), found.incident)
        write_incident(folder, own, found.evidence)
        say((folder / TEXT).read_text(encoding="utf-8").partition("\n--- ")[0])
        say(f"all of it, with text: {folder}")
    close_world()
    say(verdict(number, differing, first=(start or 0) + 1, last=step))
    return 1 if differing else 0


def verdict(number: int, differing: Sequence[str], *, first: int, last: int) -> str:
    """Whether the replay was the run.

    Args:
        number: values that both have recorded.
        differing: a sentence on each that differs.
        first: step of the replay.
        last: step of the replay.
    """
    if differing:
        return (
            f"the replay of the steps {first} to {last} is not the run: {differing[0]} ({len(differing)} of {number} "
            "values); it takes the same machine, the same number of processes and the same versions"
        )
    return (
        f"replayed the steps {first} to {last}: all {number} values that the run has recorded of them, to the last bit"
    )
