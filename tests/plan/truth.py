"""How far plans are from what was measured and published: the tables of docs/plan.md.

python -m tests.plan.truth docs/plan.md     # some ten minutes
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.cli.options import group_options
from k2train.comm import open_world
from k2train.config import RunConfig, parse
from k2train.data import prepare
from k2train.model import build_model
from k2train.paths import RunPaths
from k2train.plan.count import parameters, total, work
from k2train.plan.estimate import Part, estimate
from k2train.train.quiet import import_deepspeed
from tests.plan.operations import counted_operations
from tests.plan.published import plan_of, published
from tests.plan.runs import KINDS, STATE, Result, every_layout, measure_all, plan_config

MARK = "<!-- tables -->\n"
COUNTED = ("nano", "small", "base", "small-gqa", "small-dense", "100m")  # models that a CPU computes in seconds
LENGTH = 128
TIMED = ("small", "base", "100m")
ROUNDS = 5


def counts() -> Iterator[str]:
    """Parameters beside the model's on the meta device, operations beside those that torch counts."""
    yield "| model | parameters | on the meta device | training FLOPs of a token | torch's counter | off by |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for option in group_options("model", []):
        model = plan_of(f"model={option}").model
        own = sum(p.numel() for p in build_model(model, seed=0, device="meta").parameters())
        planned, counted, off = work(model, keys=LENGTH).training, "", ""
        if option in COUNTED:
            found = counted_operations(model, batch=2, length=LENGTH)
            counted, off = f"{found:,.0f}", f"{planned / found - 1:+.2%}"
        yield f"| {option} | {total(parameters(model)):,} | {own:,} | {planned:,.0f} | {counted} | {off} |"


def runs(results: Sequence[Result]) -> Iterator[str]:
    """Bytes that runs hold and send, of a rank in the mean, and how far the plan is off."""
    names = (*STATE, *KINDS)
    yield f"| ranks | ep | sp | ZeRO | precision | micro-batches | recomputed | offload | {' | '.join(names)} |"
    yield "| --- " * 8 + "| ---: " * len(names) + "|"
    for result in results:
        layout, errors = result.layout, result.errors()
        cells = [f"{result.measured[name]:,.0f} ({errors[name]:.1%})" if name in errors else "" for name in names]
        yield (
            f"| {layout.processes} | {layout.expert_parallel} | {layout.sequence_parallel} | {layout.zero_stage} "
            f"| {layout.precision} "
            f"| {layout.accumulation} | {layout.recompute if layout.recompute != 'none' else ''} "
            f"| {'yes' if layout.offload else ''} | {' | '.join(cells)} |"
        )


# ---- time


def product_rate() -> float:
    """FLOPs a second of square fp32 products on one thread."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    a @ b
    return 2 * 1024**3 / min(_seconds(lambda: a @ b) for _ in range(ROUNDS))


def memory_rate() -> float:
    """Bytes a second that one thread reads and writes of arrays that fit into no cache."""
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    return 2 * 4 * 2**26 / min(_seconds(lambda: target.copy_(source)) for _ in range(ROUNDS))


def _seconds(function: object) -> float:
    assert callable(function)
    begin = time.process_time()
    function()
    return time.process_time() - begin


def times(folder: Path) -> Iterator[str]:
    """Processor seconds of a training step on one thread, beside the plan with the rates of this machine."""
    from k2train.train.trainer import Trainer

    torch.set_num_threads(1)
    flops, bandwidth = product_rate(), memory_rate()
    yield (
        f"One thread of this CPU: {flops / 1e9:.0f} GFLOP/s in fp32 products of 1024, {bandwidth / 1e9:.1f} GB/s from "
        "and to memory; the rest as in `cluster=cpu`."
    )
    yield ""
    yield "| model | tokens a step | planned | measured | off by |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    import_deepspeed("cpu")
    world = open_world("cpu")
    for option in TIMED:
        words = [
            f"model={option}",
            "train.global_batch_size=4",
            "train.micro_batch_size=4",
            "train.sequence_length=256",
        ]
        words += ["train.device=cpu", "train.threads=1", f"runs_dir={folder}", f"name={option}"]
        words += [f"data.cache_dir={folder / 'cache'}", "checkpoint.asynchronous=false"]
        config = parse(RunConfig, compose(TRAIN, words))
        manifest = prepare(config.data, cache=folder / "cache", progress=lambda *_: None)
        paths = RunPaths(folder / option)
        paths.checkpoints.mkdir(parents=True)
        trainer = Trainer(config, manifest, world=world, paths=paths, say=lambda text: None)
        trainer.step()
        measured = sorted(_seconds(trainer.step) for _ in range(ROUNDS))[ROUNDS // 2]
        trainer.engine.destroy()
        own = plan_config(config, fp32_flops=flops, memory_bandwidth=bandwidth)
        planned = estimate(own, [Part("all", 1, 4, 4, 256)]).phases[0].time.step
        yield f"| {option} | 1,024 | {planned:.2f} s | {measured:.2f} s | {planned / measured - 1:+.0%} |"


def main() -> None:
    """Measures, and writes the tables behind the mark of a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    document = parser.parse_args().document
    text, mark, _ = document.read_text().partition(MARK)
    assert mark, f"{document} has no line {MARK}"
    layouts = sorted(every_layout(), key=lambda layout: layout.processes)
    with tempfile.TemporaryDirectory() as folder:
        results = measure_all(layouts, Path(folder))
        seconds = list(times(Path(folder) / "times"))
    import deepspeed

    versions = f"torch {torch.__version__}, DeepSpeed {deepspeed.__version__}, Python {platform.python_version()}"
    lines = ["", f"By {versions}, {platform.machine()}.", "", "## Published GPU-hours", "", *published()]
    lines += ["", "## Time on a CPU", "", *seconds, "", "## Parameters and operations", "", *counts()]
    lines += ["", "## What runs hold and send", "", *runs(results)]
    document.write_text(text + mark + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
