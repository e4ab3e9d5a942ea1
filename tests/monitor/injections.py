"""What the monitor makes of faults in real training: the measurement, and the table of docs/monitor.md.

Each seed is a run of its own, with all faults in it; most are skipped, so that each meets a run that no other has
spoilt. A learning rate is no fault that can be seen before the update: those come last, some way apart.

    python -m tests.monitor.injections docs/monitor.md     # three seeds, a quarter of an hour
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.comm import open_world
from k2train.config import RunConfig, parse
from k2train.data import prepare
from k2train.paths import RunPaths
from k2train.train.quiet import import_deepspeed

ROOT = Path(__file__).parents[2]  # its source is the text, which a run does not see twice
FIRST, APART, FAR_APART = 60, 10, 40  # steps
FAULTS = (
    "random_tokens",
    "one_token",
    "shuffled_tokens",
    "half_batch",
    "bad_document",
    "gradient_x1000",
    "gradient_nan",
    "loss_inf",
)
RATES = ("lr_x10", "lr_x30", "lr_x100")
SEEDS = (21, 22, 23)  # of runs with faults; others than those by which the thresholds were chosen
SMOOTH_SEEDS, SMOOTH = (11, 12, 13), 3200  # of runs without, and their steps
LAG = 3  # steps in which what follows a fault may be told


@dataclass(frozen=True)
class Outcome:
    """Of a fault in a run."""

    fault: str
    lag: int | None  # steps after it; None: it was missed
    deviations: float  # the most of any signal, at that step


def schedule() -> dict[int, str]:
    """The faults by step, from 1."""
    last = FIRST + APART * len(FAULTS)
    found = {FIRST + APART * i: fault for i, fault in enumerate(FAULTS)}
    return found | {last + FAR_APART * i: fault for i, fault in enumerate(RATES)}


def measure(seed: int, folder: Path) -> tuple[list[Outcome], int, int]:
    """The outcomes of a run; and its steps that no fault has touched, and how many of them were told.

    Args:
        seed: of weights, data and faults.
        folder: for what the run writes.
    """
    faults = schedule()
    steps = max(faults) + FAR_APART
    own = ["data=folder", f"data.path={ROOT / 'k2train'}", "train.global_batch_size=16", "train.micro_batch_size=16"]
    own += ["monitor.action=skip", "inject.allow=true"]
    own += [f"inject.faults.{step}={fault}" for step, fault in faults.items()]
    told = watch(f"faults{seed}", folder, seed=seed, steps=steps, own=own)
    outcomes, touched = [], set()
    for step, fault in faults.items():
        reach = range(step, step + (FAR_APART if fault in RATES else 1))  # a high rate is felt for long
        touched |= set(reach)
        first = next((s for s in reach[: LAG + 1] if s in told), None)
        outcomes.append(Outcome(fault, None if first is None else first - step, told.get(first or 0, 0.0)))
    smooth = set(range(1, steps + 1)) - touched
    return outcomes, len(smooth), len(smooth & told.keys())


def watch(name: str, folder: Path, *, seed: int, steps: int, own: Sequence[str]) -> dict[int, float]:
    """Trains, and prints what is told; returns the most deviations of any signal by step."""
    import_deepspeed("cpu")
    from k2train.train.trainer import Trainer

    words = [f"name={name}", f"seed={seed}", f"data.cache_dir={folder / 'cache'}", f"runs_dir={folder / 'runs'}"]
    words += ["data.tokenizer.vocab_size=512", f"schedule.steps={steps}", "schedule.warmup_steps=20"]
    words += ["train.threads=1", "train.device=cpu"]
    config = parse(RunConfig, compose(TRAIN, ["experiment=tiny", *words, *own]))
    paths = RunPaths(Path(config.runs_dir) / config.name)
    paths.checkpoints.mkdir(parents=True)
    manifest = prepare(config.data, cache=folder / "cache", progress=lambda *_: None)
    trainer = Trainer(config, manifest, world=open_world("cpu"), paths=paths, say=print)
    told = {}
    for step in range(1, steps + 1):
        trainer.step()
        if trainer.incident is not None:
            found = trainer.incident["incident"]
            print(name, step, config.inject.faults.get(str(step), ""), found["sentence"], flush=True)
            told[step] = max(abs(f["deviations"] or float("inf")) for f in found["findings"])
        elif step % 100 == 0:
            print(name, step, flush=True)
    trainer.engine.destroy()
    del trainer
    gc.collect()
    return told


def table(runs: Sequence[Sequence[Outcome]]) -> Iterator[str]:
    """Lines of Markdown: a fault a line."""
    yield "| fault | told after (steps) | deviations |"
    yield "| --- | --- | --- |"
    for same in zip(*runs, strict=True):
        lags = ", ".join("missed" if outcome.lag is None else str(outcome.lag) for outcome in same)
        yield f"| `{same[0].fault}` | {lags} | {', '.join(f'{outcome.deviations:.0f}' for outcome in same)} |"


def main() -> None:
    """Measures three seeds and writes the table after the mark of a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="whose lines after '<!-- table -->' are replaced")
    arguments = parser.parse_args()
    text, mark, _ = arguments.document.read_text().partition("<!-- table -->\n")
    assert mark, f"{arguments.document} has no line <!-- table -->"
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(seed, Path(folder)) for seed in SEEDS]
        # Python's standard library, of which a run sees each text once; small batches, whose noise is the largest.
        own = ["data=stdlib", "train.global_batch_size=8", "train.micro_batch_size=8"]
        quiet = [watch(f"smooth{seed}", Path(folder), seed=seed, steps=SMOOTH, own=own) for seed in SMOOTH_SEEDS]
    smooth, alarms = (sum(run[i] for run in found) for i in (1, 2))
    smooth, alarms = smooth + SMOOTH * len(quiet), alarms + sum(map(len, quiet))
    lines = [*table([run[0] for run in found]), "", f"Told in {smooth:,} other steps: {alarms}."]
    arguments.document.write_text(text + mark + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
