"""What a process needs for sequences of 32K and 128K tokens, and how sharing them out divides it.

    python benchmarks/long_context.py              # counted: K2 and Moonlight on the meta device
    python benchmarks/long_context.py --measured   # a small model's passes, on 1, 2 and 4 processes of this CPU

Counted: the real model runs forward and backward over one sequence without storage, on the paths of a GPU, and every
tensor is counted from its making to its end, all-to-alls included; tokens go to experts evenly. Models of two layers
and of three tell what each further one adds. A weight's gradient counts until it is whole: ZeRO reduces it then.
States are ZeRO-2's: bf16 weights, and a share of fp32 masters, momenta and gradients.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from activation_checkpointing import FORWARD_ENDS, memory
from measure import machine
from model_step import model_config
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from k2train.config import ModelConfig
from k2train.model import ExpertParallel, SequenceParallel, Transformer, build_model, causal

GIB = 2**30
# model, processes of the run, processes that share out the experts
RUNS = (("k2", 1024, 128), ("moonlight-16b", 64, 8))
# tokens of a sequence, processes that share it out, activation checkpointing
CASES = (
    (32768, 1, "full"),
    (32768, 8, "selective"),
    (32768, 8, "full"),
    (131072, 8, "full"),
    (131072, 16, "selective"),
    (131072, 16, "full"),
)
MEASURED = ((2048, "none"), (2048, "full"), (4096, "full"))
MOMENTS = {"embedding": 2, "head": 2, "norm": 2}  # AdamW's; Muon has one


class Counter(TorchDispatchMode):
    """Bytes of tensors that exist, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leaves out one that was there before."""
        self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self.now -= size


class Arrived:
    """A transfer that is over."""

    def wait(self) -> None:
        """Nothing is left to wait for."""


@contextmanager
def as_on_gpus(*, rows: int, experts_over: int) -> Iterator[None]:
    """Meta tensors take a GPU's paths, cuDNN's attention; what processes exchange goes nowhere, in even parts."""

    def always(value: Any) -> Any:  # a Mock would keep what it is called with
        return lambda *_, **__: value

    with ExitStack() as stack:
        for owner, name, value in (
            (torch.Tensor, "is_cuda", True),
            (torch.Tensor, "tolist", always([[rows // experts_over] * experts_over] * 2)),
            (causal, "choose_backend", always("cudnn")),
            (dist, "all_to_all_single", always(Arrived())),
            (dist, "all_reduce", always(None)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def counted(config: ModelConfig, *, length: int, sharing: int, experts_over: int, mode: str) -> tuple[int, int]:
    """Bytes kept for the backward pass of one sequence on a process, and at most."""
    tokens = length // sharing
    nowhere: Any = None  # the group
    parallel = SequenceParallel(nowhere, sharing, 0) if sharing > 1 else None
    model = build_model(
        config,
        seed=0,
        dtype=torch.bfloat16,
        device="meta",
        expert_parallel=ExpertParallel(nowhere, experts_over, 0),
    ).train()
    model.checkpoint_activations(mode)
    counter = Counter()
    for parameter in model.parameters():
        counter.ignore(parameter)
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    text = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    rows = tokens * config.num_experts_per_tok
    with as_on_gpus(rows=rows, experts_over=experts_over), counter:
        loss, _ = model(text, text, None, parallel)
        kept = counter.now
        loss.sum().backward()
    return kept, counter.peak


def whole(config: ModelConfig, **case: Any) -> tuple[float, float]:
    """``counted`` of all layers, from models of two and three."""
    two, three = (counted(dataclasses.replace(config, num_hidden_layers=n), **case) for n in (2, 3))
    more = config.num_hidden_layers - 3
    kept, peak = (b + more * (b - a) for a, b in zip(two, three, strict=True))
    return kept, peak


def states(config: ModelConfig, *, processes: int, experts_over: int) -> float:
    """Bytes of weights, masters, momenta and gradients on a process, ZeRO-2."""
    model = build_model(config, seed=0, device="meta")
    total = 0.0
    roles = model.parameter_roles()
    for name, parameter in model.named_parameters():
        total += 2 * parameter.numel() / (experts_over if roles[name] == "expert" else 1)
        total += 4 * parameter.numel() * (2 + MOMENTS.get(roles[name], 1)) / processes
    return total


def count_all() -> None:
    """Prints the table of the large models."""
    print("| model | T | processes a sequence | recomputed | kept | peak | states | together |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for name, processes, experts_over in RUNS:
        config = model_config(name, "model.rope_scaling=null", "model.max_position_embeddings=131072")
        held = states(config, processes=processes, experts_over=experts_over) / GIB
        for length, sharing, mode in CASES:
            case = {"length": length, "sharing": sharing, "experts_over": experts_over, "mode": mode}
            kept, peak = (value / GIB for value in whole(config, **case))
            cells = (name, f"{length:,}", sharing, mode, *(f"{x:.1f}" for x in (kept, peak, held, peak + held)))
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


# ---- a small model, for real


def measure(model: Transformer, parallel: SequenceParallel | None, *, length: int) -> tuple[int, int]:
    """As ``counted``, of what the CPU's allocator hands out beyond weights and gradients."""
    own = slice(0, length) if parallel is None else parallel.part(length)

    def run(number: int) -> None:
        model.zero_grad(set_to_none=False)
        text = torch.randint(4096, (1, length), generator=torch.Generator().manual_seed(number))
        loss, _ = model(text[:, own], text.roll(-1, 1)[:, own], None, parallel)
        with record_function(FORWARD_ENDS):
            pass
        loss.sum().backward()

    run(0)  # makes the gradients
    return memory(run)


def _work(rank: int, size: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    parallel = SequenceParallel(dist.group.WORLD, size, rank) if size > 1 else None
    model = build_model(model_config("small"), seed=0).train()
    for length, mode in MEASURED:
        model.checkpoint_activations(mode)
        kept, peak = measure(model, parallel, length=length)
        if rank == 0:
            print(f"| {length:,} | {size} | {mode} | {kept / 2**20:.0f} | {peak / 2**20:.0f} |", flush=True)
    dist.destroy_process_group()


def measure_all() -> None:
    """Prints the table of the small model."""
    print("| T | processes a sequence | recomputed | kept, MiB | peak, MiB |")
    print("| ---: | ---: | --- | ---: | ---: |", flush=True)
    for size in (1, 2, 4):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        mp.start_processes(_work, args=(size, port), nprocs=size, start_method="spawn")


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", action="store_true", help="the small model instead of the large ones")
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    if arguments.measured:
        measure_all()
    else:
        count_all()


if __name__ == "__main__":
    main()
