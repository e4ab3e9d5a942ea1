"""What a rank sees of its own machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from k2train.comm import World
from k2train.train.revision import revision

SHARED_MEMORY = "/dev/shm"
SIDE = {"cpu": 512, "cuda": 8192}  # of the product that is timed
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """Of one rank; sizes in bytes."""

    host: str
    versions: dict[str, str]
    device: str  # its name
    memory: int  # of the device
    free: int
    devices: int  # GPUs of the node, or cores that a process of it may use
    processes: int  # of the node
    shared_memory: int | None  # None: there is none
    open_files: int  # that a process may have; -1: no limit
    products: float  # multiply-adds a second


def look(world: World) -> Machine:
    """What this rank sees; takes no part in collectives."""
    if world.device.type == "cuda":
        free, memory = torch.cuda.mem_get_info(world.device)
        device, devices = torch.cuda.get_device_name(world.device), torch.cuda.device_count()
    else:
        page = os.sysconf("SC_PAGE_SIZE")
        memory, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
        device, devices = "CPU", len(os.sched_getaffinity(0))
    return Machine(
        host=platform.node(),
        versions=versions(),
        device=device,
        memory=memory,
        free=free,
        devices=devices,
        processes=world.local_size,
        shared_memory=_size(SHARED_MEMORY),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        products=product_rate(world.device),
    )


def versions() -> dict[str, str]:
    """Of what must be the same on all ranks."""
    own = revision()
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["deepspeed"] = importlib.metadata.version("deepspeed")
    found["k2train"] = own["version"] + (f" ({own['commit'][:12]})" if "commit" in own else "")
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
        if dist.is_nccl_available():
            found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def product_rate(device: torch.device) -> float:
    """Multiply-adds a second of a product of matrices in the dtype of a run, at best of a few."""
    side, dtype = SIDE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix, best = torch.ones(side, side, device=device, dtype=dtype), float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return side**3 / best


def _size(folder: str) -> int | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_frsize * found.f_blocks
