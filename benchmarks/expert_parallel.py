"""What expert parallelism costs: two processes that share out the experts, beside two that hold all of them.

    python benchmarks/expert_parallel.py --model base --batch 4 --length 512

Each process has one thread and the same number of tokens, new ones in each round: forward, loss, backward and a step of
torch's fused AdamW. In "all experts" each holds them all and needs nobody; both compute at the same time, for they
share the memory's bandwidth. In "ep 2" each holds half and they exchange tokens. "And gradients" averages those of the
dense weights too, in one all-reduce that nothing overlaps, as data parallelism needs beside either. The clock is the
wall's, so that waiting counts. A bar of 85 % of the speed was set.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import interval, machine
from model_step import model_config, our_step

from k2train.config import ModelConfig
from k2train.model import ExpertParallel, Transformer, build_model

ALL, HALF, DENSE = "all experts", "ep 2", "ep 2, and gradients"


def averager(model: Transformer) -> Callable[[], None]:
    """What averages the gradients of all weights but the experts' over the processes."""
    dense = [p for name, p in model.named_parameters() if ".experts." not in name]

    def average() -> None:
        flat = torch.cat([p.grad.flatten() for p in dense])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, mean in zip(dense, flat.split([p.numel() for p in dense]), strict=True):
            parameter.grad.copy_(mean.view_as(parameter))

    return average


def expert_mib(model: Transformer) -> float:
    """Of the experts' weights that a process holds."""
    return sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name) / 2**20


def worker(rank: int, store: str, config: ModelConfig, batch: int, length: int, rounds: int) -> None:
    """One of the two processes; the first prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    parallel = ExpertParallel(group=dist.group.WORLD, size=2, rank=rank)
    whole, shared = build_model(config, seed=0), build_model(config, seed=0, expert_parallel=parallel)
    steps = {
        ALL: our_step(whole, batch=batch, length=length),
        HALF: our_step(shared, batch=batch, length=length),
        DENSE: our_step(shared, batch=batch, length=length, reduce_gradients=averager(shared)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            step(2 * number + rank)
            dist.barrier()  # the slower process decides
            if number:
                seconds[name].append(time.perf_counter() - begin)
    if rank == 0:
        print("| | ms a step | MiB of experts | speed |\n| --- | ---: | ---: | ---: |")
        for name, found in seconds.items():
            ratio, low, high = interval([a / b for a, b in zip(seconds[ALL], found, strict=True)])
            held = expert_mib(whole if name == ALL else shared)
            cells = [name, f"{1e3 * statistics.median(found):.0f}", f"{held:.1f}"]
            print(f"| {' | '.join(cells)} | {ratio:.0%} ({low:.0%} to {high:.0%}) |")
    dist.destroy_process_group()


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", help="of configs/model")
    parser.add_argument("--batch", type=int, default=4, help="sequences of each process")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (arguments.batch, arguments.length, arguments.rounds)
    print(f"{machine()}\n\n{arguments.model}, fp32, two processes, batch {sizes[0]} each, T {sizes[1]}.\n")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(f"{folder}/store", model_config(arguments.model), *sizes), nprocs=2)


if __name__ == "__main__":
    main()
