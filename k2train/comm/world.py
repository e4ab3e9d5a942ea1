"""The process group of a run: one process on a laptop and thousands under torchrun come through the same door."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from k2train.comm.meeting import meet

# How long ranks wait for each other where nothing else is said.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    local_rank: int  # within the node
    local_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process speaks for the run: prints, writes metrics, publishes checkpoints."""
        return self.rank == 0


def open_store(timeout: timedelta = TIMEOUT) -> Store:
    """Where ranks leave words for each other before there is a process group: the store that torchrun keeps, or rank 0.

    Args:
        timeout: for the ranks to find it, and each other in it; see ``meet``.

    Raises:
        FailedTogether: a rank has not come in time.
    """
    rank, size = _place()
    if size == 1:
        return HashStore()
    store: Store = next(rendezvous("env://", rank, size, timeout=timeout))[0]
    return meet(store, rank, size, limit=timeout)


def open_world(device: str, *, store: Store | None = None, timeout: timedelta = TIMEOUT) -> World:
    """Joins the process group that torchrun's environment describes, or makes one of a single process.

    Args:
        device: ``cpu``, ``cuda`` or ``auto`` (cuda where torch sees one).
        store: of ``open_store``, if it has been opened.
        timeout: of each collective: a rank that waits longer for another fails.

    Raises:
        ValueError: cuda is asked for and not there, or a node has fewer GPUs than processes.
    """
    rank, size = _place()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun, or deepspeed
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cpu":
        place, backend = torch.device("cpu"), "gloo"
    else:
        place, backend = _gpu(local_rank, local_size), "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        store = store or open_store(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, local_rank, local_size, place)


def close_world() -> None:
    """Leaves the process group; does nothing outside of one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _place() -> tuple[int, int]:
    """Rank and number of processes, as torchrun tells them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _gpu(local_rank: int, local_size: int) -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError(
            "train.device=cuda, but torch sees no CUDA device here: use train.device=cpu, "
            f"or install a CUDA build of torch (this is {torch.__version__}) and check `nvidia-smi`"
        )
    if (count := torch.cuda.device_count()) < local_size:
        raise ValueError(
            f"{local_size} processes were started on a node with {count} GPU{'s' if count > 1 else ''}: "
            f"use torchrun --nproc_per_node {count}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
