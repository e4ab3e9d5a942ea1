"""What the loop costs beside forward, backward and optimizer: of a run at the default size, as a share of its steps.

    python benchmarks/loop_overhead.py [--steps 20] [OVERRIDES ...]

The time inside the engine's forward, backward and step is subtracted from the time of the loop between two steps, in
which are: reading the batch, the sums, the routers' biases, the record, hooks, metrics.jsonl. One process on the CPU,
where nothing runs in the background.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.comm import open_world
from k2train.config import RunConfig, parse
from k2train.data import prepare
from k2train.paths import RunPaths, cache_dir
from k2train.train.hooks import Hook
from k2train.train.quiet import import_deepspeed


class Clock(Hook):
    """Wraps the engine's methods; notes for each step its whole time and theirs."""

    def start(self, trainer: Any) -> None:
        """Wraps them."""
        self.inside, self.steps, self._begin = 0.0, [], time.perf_counter()
        engine = trainer.engine
        for name in ("forward", "backward", "step"):
            setattr(engine, name, self._timed(getattr(engine, name)))

    def _timed(self, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.inside += time.perf_counter() - begin

        return call

    def log(self, record: Any) -> None:
        """A step has ended."""
        now = time.perf_counter()
        self.steps.append((now - self._begin, self.inside))
        self._begin, self.inside = now, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    import_deepspeed("cpu")
    from k2train.train.metrics import MetricsFile
    from k2train.train.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"schedule.steps={arguments.steps}",
            "schedule.warmup_steps=1",
            "validate.every=0",
            "checkpoint.every=0",
        ]
        config = parse(RunConfig, compose(TRAIN, [*words, "train.device=cpu", *arguments.overrides]))
        manifest = prepare(config.data, cache=cache_dir(config.data.cache_dir), progress=lambda *_: None)
        paths = RunPaths(Path(folder))
        paths.checkpoints.mkdir(parents=True)
        clock = Clock()
        hooks = [MetricsFile(paths.metrics, say=print), clock]
        Trainer(config, manifest, world=open_world("cpu"), paths=paths, say=print, hooks=hooks).train()
    kept = clock.steps[3:]  # the first ones allocate
    shares = [1 - inside / whole for whole, inside in kept]
    whole = statistics.median(whole for whole, _ in kept)
    print(
        f"{len(kept)} steps, median {whole * 1000:.1f} ms; beside the engine {statistics.median(shares):.2%} of a step"
    )


if __name__ == "__main__":
    main()
