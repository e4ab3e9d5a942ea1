"""What watching costs: telemetry and the monitor, as shares of the steps of a run at the default size.

    python benchmarks/monitor_cost.py [--steps 60] [OVERRIDES ...]

The run has telemetry at every 10th step and never looks at the spectrum. The time inside telemetry (what it adds to a
step that is due, the stopwatch, and the record) and inside the monitor's decision and warnings is added up and divided
by the time of all steps. One process on the CPU, where nothing runs in the background.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import muonclip.optimizer
from measure import machine

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.comm import open_world
from k2train.config import RunConfig, parse
from k2train.data import prepare
from k2train.monitor import Drift, Monitor
from k2train.paths import RunPaths, cache_dir
from k2train.train.hooks import Hook
from k2train.train.quiet import import_deepspeed


class Costs(Hook):
    """Seconds by what they were spent on, from the first step on."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, function: str, name: str) -> None:
        """Adds up a function's time."""
        original = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        setattr(owner, function, timed)

    def start(self, trainer: Any) -> None:
        """The first step counts for nothing: it allocates."""
        self._trainer = trainer

    def after_step(self, step: Any, *, applied: bool) -> None:
        """Forgets what the first step took."""
        if step.number == 0:
            self.seconds.clear()
            self.begin = self._trainer.progress.elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    import_deepspeed("cpu")
    from k2train.train.metrics import MetricsFile
    from k2train.train.stopwatch import Stopwatch
    from k2train.train.telemetry import Norms, Telemetry
    from k2train.train.trainer import Trainer

    costs = Costs()
    for owner, functions, name in (
        (muonclip.optimizer, ("adamw_update",), "telemetry"),  # which nothing else asks for
        (Telemetry, ("observe", "take"), "telemetry"),
        (Norms, ("add",), "telemetry"),
        (Stopwatch, ("start", "stop"), "telemetry"),
        (Monitor, ("decide",), "detector"),
        (Drift, ("observe",), "detector"),
    ):
        for function in functions:
            costs.wrap(owner, function, name)
    with tempfile.TemporaryDirectory() as folder:
        words = [f"schedule.steps={arguments.steps}", "schedule.warmup_steps=1", "validate.every=0"]
        words += ["checkpoint.every=0", "track.spectrum_every=0", "train.device=cpu", *arguments.overrides]
        config = parse(RunConfig, compose(TRAIN, words))
        manifest = prepare(config.data, cache=cache_dir(config.data.cache_dir), progress=lambda *_: None)
        paths = RunPaths(Path(folder))
        paths.checkpoints.mkdir(parents=True)
        hooks = [MetricsFile(paths.metrics, say=print), costs]
        trainer = Trainer(config, manifest, world=open_world("cpu"), paths=paths, say=print, hooks=hooks)
        trainer.train()
    whole = trainer.progress.elapsed - costs.begin
    print(f"{machine('deepspeed')}\n")
    print(f"{arguments.steps - 1} steps of {1000 * whole / (arguments.steps - 1):.0f} ms\n")
    print("| | ms a step | share |\n| --- | ---: | ---: |")
    for name, seconds in costs.seconds.items():
        print(f"| {name} | {1000 * seconds / (arguments.steps - 1):.3f} | {seconds / whole:.3%} |")


if __name__ == "__main__":
    main()
