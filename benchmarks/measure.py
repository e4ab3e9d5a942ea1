"""What the benchmarks share: clocks, intervals, the machine in words, and its own limit in matrix products."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

BFLOAT16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def clock() -> float:
    """Seconds: of the processor with one thread, so that other work on the machine counts less; else of the wall.

    With a GPU in use, of the wall once it has nothing left to do.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and the order statistics around it that hold the true one with 95 % confidence if there are six."""
    ordered = sorted(values)
    n, low, missed = len(ordered), 0, 2 * 0.5 ** len(ordered)
    while low + 1 < n // 2 and (more := missed + 2 * math.comb(n, low + 1) * 0.5**n) <= 0.05:
        low, missed = low + 1, more
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


def interleaved(contestants: Mapping[str, Callable[[int], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant's call in each round, in random order, after a round that does not count.

    Args:
        contestants: by name; called with the number of the round, so that inputs can be fresh in each.
        rounds: how many.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            begin = clock()
            contestants[name](number)
            if number:
                seconds[name].append(clock() - begin)
    return seconds


def gemm_peak(dtype: torch.dtype, *, device: str = "cpu", rounds: int = 15) -> float:
    """FLOP/s of the best of several square matrix products: what this machine and these threads can do at most."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    best = math.inf
    for _ in range(rounds):
        begin = clock()
        torch.mm(a, b)
        best = min(best, clock() - begin)
    return 2 * size**3 / best


def machine(*packages: str) -> str:
    """Processor, cores, threads and versions: what stands above every table."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    if torch.cuda.is_initialized():
        names = [f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; host {names[0] if names else 'unknown'}"]
    versions = [f"torch {torch.__version__}"]
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{'with' if BFLOAT16 else 'no'} bfloat16 products ({torch.backends.cpu.get_cpu_capability()}); "
        + ", ".join(versions)
    )
