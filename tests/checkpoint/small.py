"""A checkpoint of three small tensors, written by one process."""

from pathlib import Path

import torch

from k2train.checkpoint import Interval, save_checkpoint
from k2train.comm import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SHAPES = {"a.weight": (3, 5), "experts.w1": (4, 2, 3), "bias": (7,)}


def full(name: str) -> torch.Tensor:
    return torch.arange(torch.Size(SHAPES[name]).numel(), dtype=torch.float32)


def cut(name: str, start: int, stop: int, key: str = "master") -> Interval:
    return Interval(name, key, start, full(name)[start:stop])


def save(directory: Path, step: int = 1, intervals: list[Interval] | None = None) -> Path:
    whole = [cut(name, 0, len(full(name))) for name in SHAPES]
    return save_checkpoint(
        directory, step=step, intervals=intervals or whole, shapes=SHAPES, state={"seed": 7}, world=ALONE
    )
