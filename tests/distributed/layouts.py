"""Every layout of a run gives what one process gives: the measurement, and the table of docs/layouts.md.

The truth is a plain loop in one process: no DeepSpeed, no shards, the whole batch at once. A layout is a real run, by
the Trainer, of the same ten steps, on 1, 2 or 4 processes over gloo. All runs of as many processes are done by one
process group in turn, as starting processes is what takes time.

    python -m tests.distributed.layouts docs/layouts.md     # the whole product, some 20 minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import multiprocessing
import os
import platform
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from k2train.checkpoint import newest_checkpoint
from k2train.comm import World, close_world, open_world
from k2train.config import RunConfig
from k2train.generate import sample_text
from k2train.paths import RunPaths
from k2train.train import engine, zero
from k2train.train.audit import not_once
from k2train.train.quiet import import_deepspeed
from k2train.train.trainer import Trainer
from tests.distributed.observed import apart
from tests.distributed.plain import (
    HALF,
    STEPS,
    Layout,
    Routes,
    Truth,
    config_of,
    load_truth,
    loss_on_held_out,
    plain_loop,
    prepared,
    save_truth,
    write_text,
)


@dataclass(frozen=True)
class Run:
    """A run in a layout; it goes on from where an earlier one of its name has stopped."""

    layout: Layout
    name: str
    until: int = STEPS


@dataclass(frozen=True)
class Result:
    """What a run, or its last part, differs in from one process."""

    layout: Layout
    optimizer: str  # DeepSpeed's class
    drift: float  # ||W - W'|| / ||W' - W_0|| over the model
    worst_drift: float  # over one parameter, the largest
    worst: str
    loss: float  # largest difference of a step's loss
    telemetry: float  # largest relative difference of a number, any step
    held_out: float  # difference of the loss on held-out text, read between two steps
    flips: int  # tokens that went to other experts, over all layers and steps
    clipped_heads: int  # over all steps
    clipped_gradients: int  # steps
    orthogonalised: tuple[int, int]  # fewest and most times that a matrix was, a step, over all processes
    held: tuple[int, int]  # stage 3: elements of weights on a process while they are made, at most; and the bound on it
    bad_step_ignored: bool  # one more step, with a gradient that is not finite on one process, changed nothing
    sample: str
    seconds: float


def every_layout() -> list[Layout]:
    """The whole product, without what cannot be: more expert parallelism than processes, or what an axis excludes."""
    found = []
    for processes in (1, 2, 4):
        for expert_parallel in (size for size in (1, 2, 4) if processes % size == 0):
            for stage, accumulation, overlap, offload in itertools.product(
                (1, 2, 3), (1, 2), (False, True), (False, True)
            ):
                layout = Layout(processes, expert_parallel, stage, "fp32", accumulation, overlap, offload)
                found.append(layout)
                if stage == 1 and not overlap and not offload:  # BF16_Optimizer knows neither
                    found.append(dataclasses.replace(layout, precision="bf16"))
            found += [
                Layout(processes, expert_parallel, stage, recompute=recompute)
                for stage in (1, 2, 3)
                for recompute in ("selective", "full")
            ]
    return found


def shared_sequences() -> list[Layout]:
    """One process, and each way of sharing out sequences over 2 and 4."""
    found = [Layout(1)]
    for processes, sharing in ((2, 2), (4, 2), (4, 4)):
        for expert_parallel, stage in itertools.product((1, 2), (1, 2, 3)):
            layout = Layout(processes, expert_parallel, stage, sequence_parallel=sharing)
            found += [layout, dataclasses.replace(layout, accumulation=2, recompute="selective")]
            if stage == 1:
                found.append(dataclasses.replace(layout, precision="bf16"))
    return found


def measure(run: Run, folder: Path, expected: Truth) -> Result:
    """One run, by all processes together; the result is rank 0's to use."""
    begin, layout = time.perf_counter(), run.layout
    config = dataclasses.replace(config_of(folder, layout), name=run.name)
    settings = engine.deepspeed_config

    def changed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found = settings(*args, **kwargs)
        found["zero_optimization"]["overlap_comm"] = layout.overlap
        if layout.sub_group_size:
            found["zero_optimization"]["sub_group_size"] = layout.sub_group_size
        return found

    world, partitions = open_world("cpu"), Partitions()
    with (
        mock.patch.object(engine, "deepspeed_config", changed),
        mock.patch.object(zero, "partitioner", partitions.partitioner),
    ):
        paths = RunPaths(folder / "runs" / run.name)
        paths.checkpoints.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(config, prepared(folder), world=world, paths=paths, say=lambda text: None)
    assert (len(trainer.state.held) > len(trainer.optimizer.param_groups)) == bool(layout.sub_group_size)
    first, routes = trainer.progress.step, Routes(trainer.model)
    records, held_out, counts = [], expected.held_out, []
    for step in range(first, run.until):
        if step == HALF:
            held_out = loss_on_held_out(trainer.model, trainer.dataset, config, trainer._sequence_parallel)
        trainer.optimizer.orthogonalized = Counter()
        assert trainer.step()
        records.append(trainer.record())
        counts.append(_times_orthogonalised(trainer))
    trainer.optimizer.orthogonalized = None
    sample = expected.sample
    if run.until == STEPS and layout.precision == "fp32":
        sample = sample_text(trainer.model, trainer.dataset.tokenizer, config.generate, "cpu")
    trainer.save()
    trainer.saver.wait()
    reached = newest_checkpoint(paths.checkpoints, world=world, say=print)
    assert reached is not None
    assert reached.manifest.step == run.until
    reader = reached.reader
    weights = {name: reader.read(name, "master") for name in expected.weights}
    drift, worst_drift, worst = _drift(weights, expected) if run.until == STEPS else (0.0, 0.0, "")
    flips = int((_routes_of_all(routes, config, world) != expected.experts[first : run.until]).any(-1).sum())
    result = Result(
        layout,
        type(trainer.engine.optimizer).__name__,
        drift,
        worst_drift,
        worst,
        max(abs(r["loss"] - loss) for r, loss in zip(records, expected.losses[first:], strict=False)),
        max(apart(r, numbers) for r, numbers in zip(records, expected.telemetry[first:], strict=False)),
        abs(held_out - expected.held_out),
        flips,
        sum(r["clipped_heads"] for r in records),
        sum(r["grad_norm"] > config.optim.clip_grad_norm for r in records),
        (min(low for low, _ in counts), max(high for _, high in counts)),
        partitions.held(world, total=sum(w.numel() for w in expected.weights.values())),
        _ignores_a_bad_step(trainer),
        sample,
        time.perf_counter() - begin,
    )
    trainer.engine.destroy()
    del trainer, routes
    gc.collect()
    return result


def _times_orthogonalised(trainer: Trainer) -> tuple[int, int]:
    """Fewest and most, over all matrices and all processes."""
    counts = trainer.optimizer.orthogonalized
    assert counts is not None
    wrong = not_once(counts, trainer.optimizer, trainer.model, trainer.state.experts)
    times = [1, *(int(sentence.split(" orthogonalised ")[1].split()[0]) for sentence in wrong)]
    return min(times), max(times)


class Partitions:
    """Watches how much of the weights a process holds while stage 3 makes them one by one."""

    def __init__(self) -> None:
        self._partitioner = zero.partitioner
        self._parts, self._most, self._sizes = 0, 0, [0]

    def partitioner(self, device: torch.device) -> Callable[[torch.nn.Parameter], None]:
        """In the place of the real one."""
        partition = self._partitioner(device)

        def watched(parameter: torch.nn.Parameter) -> None:
            assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
            self._sizes.append(parameter.numel())
            self._most = max(self._most, self._parts + parameter.numel())
            partition(parameter)
            assert parameter.untyped_storage().nbytes() <= parameter.element_size()
            self._parts += parameter.ds_tensor.untyped_storage().nbytes() // parameter.element_size()

        return watched

    def held(self, world: World, *, total: int) -> tuple[int, int]:
        """What it was at most, and what it may be: the parameter at hand, an even share of the model's ``total``, and
        an element more for each parameter, as not all divide."""
        return self._most, max(self._sizes) + total // world.size + len(self._sizes)


def _ignores_a_bad_step(trainer: Trainer) -> bool:
    """Whether no weight, momentum, router bias or clip is touched, on any process, though one alone sees the fault."""

    def state() -> list[Tensor]:
        held = [trainer.clip.cumulative, *(moe.gate.e_score_correction_bias for _, moe in trainer.model.moe_layers())]
        for flat, _ in trainer.optimizer.tensors():
            held += [flat, *trainer.optimizer.state[flat].values()]
        return [tensor.detach().clone() for tensor in held]

    before, world = state(), trainer.world
    bad = float("nan") if world.rank == world.size - 1 else 1.0
    hook = trainer.model.layers[0].self_attn.o_proj.weight.register_hook(lambda grad: grad * bad)
    applied = trainer.step()
    hook.remove()
    assert (trainer.clip.max_logits > trainer.clip.tau).any()  # there would have been something to clip
    unmoved = not applied and all(map(torch.equal, before, state())) and bool((trainer.clip.gamma == 1).all())
    agreed = torch.tensor(int(unmoved))
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed)


def _drift(weights: dict[str, Tensor], expected: Truth) -> tuple[float, float, str]:
    apart = {name: (weights[name] - w).norm().item() for name, w in expected.weights.items()}
    moved = {name: (w - expected.start[name]).norm().item() for name, w in expected.weights.items()}
    ratio, worst = max((apart[name] / moved[name], name) for name in apart)
    return sum(a * a for a in apart.values()) ** 0.5 / sum(m * m for m in moved.values()) ** 0.5, ratio, worst


def _routes_of_all(routes: Routes, config: RunConfig, world: World) -> Tensor:
    """[steps, layers, tokens, K], the samples of each step in order, on all ranks."""
    layers = config.model.num_hidden_layers - config.model.first_k_dense_replace
    micro_batch, sharing = config.train.micro_batch_size, config.parallel.sequence_parallel
    micro_batches = config.train.global_batch_size * sharing // (micro_batch * world.size)
    own = torch.stack(routes.chosen)  # [steps * micro-batches * layers, tokens, K]
    own = own.view(-1, micro_batches, layers, micro_batch, own.shape[1] // micro_batch, own.shape[2])
    parts = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(parts, own)
    # steps, micro-batches, ranks, parts of a sequence, layers, samples, tokens, K
    everywhere = torch.stack(parts, 2).unflatten(2, (-1, sharing))
    return everywhere.permute(0, 4, 1, 2, 5, 3, 6, 7).flatten(2, 6)


def _work(rank: int, port: int, runs: Sequence[Run], folder: Path) -> None:
    size = runs[0].layout.processes
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import_deepspeed("cpu")
    open_world("cpu")
    expected = load_truth(folder)
    for run in runs:
        result = measure(run, folder, expected)
        if rank == 0:
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    close_world()


def measure_all(runs: Sequence[Run], folder: Path) -> list[Result]:
    """The results, in the order of the runs: as many processes as the first needs, then as the next needs.

    Args:
        runs: what is to be run.
        folder: of their own, with room for some megabytes a run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    multiprocessing.set_forkserver_preload([__name__, "deepspeed.runtime.zero.muon.muon_optimizer"])
    write_text(folder)
    save_truth(plain_loop(folder), folder)
    for _, group in itertools.groupby(runs, key=lambda run: run.layout.processes):
        together = list(group)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        size = together[0].layout.processes
        mp.start_processes(_work, args=(port, together, folder), nprocs=size, start_method="forkserver")
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [_result(json.loads(line)) for line in lines]


def _result(values: dict[str, Any]) -> Result:
    pairs = {key: tuple(values.pop(key)) for key in ("orthogonalised", "held")}
    return Result(layout=Layout(**values.pop("layout")), **pairs, **values)


# ---- the table


def table(results: Sequence[Result]) -> Iterator[str]:
    """Lines of Markdown."""
    yield (
        "| processes | experts over | ZeRO | precision | accumulation | overlap | offload | recomputed | drift "
        "| worst parameter | loss | telemetry | held out | flips | orthogonalised "
        "| heads clipped | bad step ignored | held |"
    )
    yield "| --- " * 18 + "|"
    for r in results:
        layout = r.layout
        low, high = r.orthogonalised
        yield (
            f"| {layout.processes} | {layout.expert_parallel} | {layout.zero_stage} | {layout.precision} "
            f"| {layout.accumulation} | {'yes' if layout.overlap else ''} | {'yes' if layout.offload else ''} "
            f"| {layout.recompute if layout.recompute != 'none' else ''} "
            f"| {r.drift:.1e} | {r.worst_drift:.1e} | {r.loss:.1e} | {r.telemetry:.1e} | {r.held_out:.1e} | {r.flips} "
            f"| {low if low == high else f'{low} to {high}'} | {r.clipped_heads} "
            f"| {'yes' if r.bad_step_ignored else 'no'} | {f'{r.held[0] / r.held[1]:.2f}' if r.held[0] else ''} |"
        )


def main() -> None:
    """Measures every layout and writes the table between the marks of a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="whose lines after '<!-- table -->' are replaced")
    arguments = parser.parse_args()
    text, mark, _ = arguments.document.read_text().partition("<!-- table -->\n")
    assert mark, f"{arguments.document} has no line <!-- table -->"
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = [Run(layout, f"run{number}") for number, layout in enumerate(every_layout())]
        results = measure_all(runs, Path(folder))
    minutes = (time.perf_counter() - begin) / 60
    import deepspeed

    lines = [
        f"{len(results)} layouts in {minutes:.0f} minutes; torch {torch.__version__}, DeepSpeed "
        f"{deepspeed.__version__}, Python {platform.python_version()}, {platform.machine()}, a thread a process.",
        "",
        *table(results),
    ]
    arguments.document.write_text(text + mark + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
