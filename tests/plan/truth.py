"""How far plans are from what was measured and published: the tables of docs/plan.md.

python -m tests.plan.truth docs/plan.md     # some ten minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from k2train.cli.commands import PLAN, TRAIN
from k2train.cli.compose import compose
from k2train.cli.options import group_options
from k2train.comm import open_world
from k2train.config import PlanConfig, RunConfig, parse
from k2train.data import prepare
from k2train.model import build_model
from k2train.paths import RunPaths
from k2train.plan.count import parameters, total, work
from k2train.plan.estimate import Part, estimate, with_vocabulary
from k2train.plan.search import search
from k2train.train.quiet import import_deepspeed
from k2train.units import count
from tests.plan.operations import counted_operations
from tests.plan.runs import KINDS, STATE, Result, every_layout, measure_all, plan_config

MARK = "<!-- tables -->\n"
COUNTED = ("nano", "small", "base", "small-gqa", "small-dense", "100m")  # models that a CPU computes in seconds
LENGTH = 128
TIMED = ("small", "base", "100m")
ROUNDS = 5

DEEPSEEK_V3 = (
    "model=k2 model.num_attention_heads=128 model.first_k_dense_replace=3 model.n_routed_experts=256 model.n_group=8 "
    "model.topk_group=4 model.vocab_size=129280 model.rope_scaling=null"
)
DEEPSEEK_V2 = (
    "model=k2 model.hidden_size=5120 model.num_hidden_layers=60 model.num_attention_heads=128 model.vocab_size=102400 "
    "model.intermediate_size=12288 model.moe_intermediate_size=1536 model.n_routed_experts=160 model.n_group=8 "
    "model.topk_group=3 model.num_experts_per_tok=6 model.n_shared_experts=2 model.rope_scaling=null"
)
LLAMA = (
    "model=small-dense model.num_key_value_heads=8 model.qk_rope_head_dim=128 model.v_head_dim=128 "
    "model.vocab_size=128256 model.max_position_embeddings=8192"
)
LLAMA_8B = (
    f"{LLAMA} model.hidden_size=4096 model.num_hidden_layers=32 model.first_k_dense_replace=32 "
    "model.num_attention_heads=32 model.intermediate_size=14336"
)
LLAMA_405B = (
    f"{LLAMA} model.hidden_size=16384 model.num_hidden_layers=126 model.first_k_dense_replace=126 "
    "model.num_attention_heads=128 model.intermediate_size=53248"
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A training that others have reported."""

    name: str
    source: str
    machine: str  # the plan's words
    model: str  # the plan's words
    tokens: float
    batch: int  # sequences
    length: int  # tokens
    hours: float | None  # of GPUs; None: not published


PUBLISHED = (
    Published(
        "DeepSeek-V3, pre-training",
        "arXiv 2412.19437, table 1: 2,664 K H800 hours (2,788 K with 32K, 128K and post-training); FP8",
        "cluster=h800-2048",
        DEEPSEEK_V3,
        14.8e12,
        16384,
        4096,
        2.664e6,
    ),
    Published(
        "DeepSeek-V2",
        "arXiv 2405.04434, section 3.2.3: 172.8 K H800 hours for a trillion tokens; 8.1 trillion",
        "cluster=h800 cluster.nodes=128",
        DEEPSEEK_V2,
        8.1e12,
        8192,
        4096,
        8.1 * 172.8e3,
    ),
    Published(
        "Llama-3.1-8B",
        "its model card: 1.46 M H100 hours; 15 trillion tokens; number of GPUs assumed",
        "cluster=h100 cluster.nodes=64",
        LLAMA_8B,
        15e12,
        1024,
        8192,
        1.46e6,
    ),
    Published(
        "Llama-3.1-405B",
        "its model card: 30.84 M H100 hours; arXiv 2407.21783, table 4: 16,384 GPUs, 16 M tokens a step",
        "cluster=h100 cluster.nodes=2048",
        LLAMA_405B,
        15.6e12,
        2048,
        8192,
        30.84e6,
    ),
    Published(
        "Kimi K2, at 4K",
        "arXiv 2507.20534",
        "cluster=h800-2048",
        "model=k2 model.rope_scaling=null",
        15.5e12,
        16384,
        4096,
        None,
    ),
    Published(
        "Moonlight-16B-A3B",
        "arXiv 2502.16982",
        "cluster=h100 cluster.nodes=32",
        "model=moonlight-16b",
        5.7e12,
        4096,
        8192,
        None,
    ),
)


def plan_of(words: str) -> PlanConfig:
    """The config of ``k2train plan WORDS``."""
    return with_vocabulary(parse(PlanConfig, compose(PLAN, words.split())))


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


def published() -> Iterator[str]:
    """GPU-hours of others' trainings beside the fastest split that ``--search`` finds."""
    yield "| training | published | planned, GPU-hours | planned over published | utilisation | split |"
    yield "| --- | --- | ---: | ---: | ---: | --- |"
    for one in PUBLISHED:
        config = plan_of(f"{one.machine} {one.model} train.micro_batch_size=1")
        steps = round(one.tokens / (one.batch * one.length))
        found = search(config, [Part("training", steps, one.batch, 1, one.length)])
        if not found.fitting:
            yield f"| {one.name} | {one.source} | does not fit | | | on {config.cluster.devices} |"
            continue
        candidate, best = found.fitting[0]
        ratio = f"{best.device_hours / one.hours:.2f}" if one.hours else "not published"
        yield (
            f"| {one.name}: {count(best.parameters)} | {one.source} | {count(best.device_hours)} | {ratio} "
            f"| {best.utilisation:.0%} | ZeRO-{candidate.zero_stage}, ep {candidate.expert_parallel}, micro-batch "
            f"{candidate.micro_batch_size}, {candidate.activation_checkpointing} on {best.layout.ranks} |"
        )


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
