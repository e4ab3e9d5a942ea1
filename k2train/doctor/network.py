"""How fast ranks reach each other, which of them is slow, and whose clock is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.comm import World

ELEMENTS = {"cpu": 2**21, "cuda": 2**26}  # fp32, of what is sent
REPEATS = 3
PINGS = 5


@dataclass(frozen=True)
class Network:
    """Bytes a second that a rank sends and receives."""

    all_reduce: float  # of a ring: 2 (n - 1) / n of the tensor
    all_to_all: float  # (n - 1) / n of the tensor
    pair: float  # with that of a few other ranks with which it goes best


def measure(world: World) -> Network | None:
    """What this rank attains; called by all ranks together. None where it is alone."""
    if world.size == 1:
        return None
    size = ELEMENTS[world.device.type] // world.size * world.size
    sent, received = torch.ones(size, device=world.device), torch.empty(size, device=world.device)
    moved = sent.numel() * sent.itemsize * (world.size - 1) / world.size
    return Network(
        all_reduce=2 * moved / _fastest(lambda: dist.all_reduce(sent), world),
        all_to_all=moved / _fastest(lambda: dist.all_to_all_single(received, sent), world),
        pair=_best_pair(sent, received, world),
    )


def _best_pair(sent: Tensor, received: Tensor, world: World) -> float:
    """With the ranks whose number differs in one bit: a slow rank is slow with each, its partners are not."""
    best, distance = 0.0, 1
    while distance < world.size:
        partner = world.rank ^ distance
        here = partner < world.size
        seconds = _fastest(lambda: _exchange(sent, received, partner) if here else None, world)  # noqa: B023
        if here:
            best = max(best, sent.numel() * sent.itemsize / seconds)
        distance *= 2
    return best


def _exchange(sent: Tensor, received: Tensor, partner: int) -> None:
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
    ):
        work.wait()


def _fastest(operation: Callable[[], object], world: World) -> float:
    """Seconds, at best of a few; the first time, which connects, does not count."""
    best = float("inf")
    for number in range(REPEATS + 1):
        dist.barrier()
        begin = time.perf_counter()
        operation()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        if number:
            best = min(best, time.perf_counter() - begin)
    return best


def now() -> float:
    """Seconds since the epoch, by this rank's clock."""
    return time.time()


def clock_offsets(world: World) -> list[float]:
    """On rank 0, seconds that each rank's clock is ahead of its own; called by all ranks together.

    A rank answers with its time, which is held against the middle of the time that the answer took, at best of a few.
    """
    told = torch.zeros(1, dtype=torch.float64)
    if not world.main:
        for _ in range(PINGS):
            dist.recv(told, 0)
            told[0] = now()
            dist.send(told, 0)
        return []
    offsets = [0.0]
    for rank in range(1, world.size):
        found = []
        for _ in range(PINGS):
            asked = now()
            dist.send(told, rank)
            dist.recv(told, rank)
            answered = now()
            found.append((answered - asked, float(told) - (asked + answered) / 2))
        offsets.append(min(found)[1])
    return offsets
