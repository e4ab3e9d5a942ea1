"""A released model as the checkpoint of a run that has not taken a step: what ``init_from`` begins with."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import k2train
from k2train.checkpoint import Deferred, DeferredInterval, save_checkpoint
from k2train.comm import World
from k2train.config import RunConfig, to_dict
from k2train.export.names import Place
from k2train.export.read import ReleasedFolder
from k2train.export.write import BIAS
from k2train.paths import RunPaths, atomic_write


def write_start(released: ReleasedFolder, definition: str, *, config: RunConfig, world: World) -> Path:
    """Writes a run's folder with a checkpoint of step 0: fp32 masters and router biases, no momenta.

    Args:
        released: the model.
        definition: its tokenizer.json.
        config: of the run; its model and tokenizer are those of the folder.
        world: of one process.

    Returns:
        The checkpoint.
    """
    paths = RunPaths(Path(config.runs_dir).expanduser() / config.name)
    paths.root.mkdir(parents=True)
    shapes = released.shapes
    try:
        atomic_write(paths.tokenizer, definition)
        return save_checkpoint(
            paths.checkpoints,
            step=0,
            intervals=[interval for name, shape in shapes.items() for interval in _intervals(released, name, shape)],
            shapes=shapes,
            state=_state(config, definition, released),
            world=world,
        )
    except BaseException:
        shutil.rmtree(paths.root, ignore_errors=True)
        raise


def _intervals(released: ReleasedFolder, name: str, shape: tuple[int, ...]) -> list[DeferredInterval]:
    """One for each matrix, so that experts are read one at a time."""
    key = "buffer" if name.endswith(BIAS) else "master"
    places = [Place(name, expert) for expert in range(shape[0])] if len(shape) == 3 else [Place(name)]
    numel = math.prod(shape) // len(places)
    return [
        DeferredInterval(name, key, number * numel, Deferred((numel,), torch.float32, _Read(released, place)))
        for number, place in enumerate(places)
    ]


@dataclass(frozen=True)
class _Read:
    released: ReleasedFolder
    place: Place

    def __call__(self) -> torch.Tensor:
        return self.released.read(self.place).flatten()


def _state(config: RunConfig, definition: str, released: ReleasedFolder) -> Mapping[str, Any]:
    """What a checkpoint of a run says of itself, as far as there is a run."""
    return {
        "progress": {"step": 0, "skipped_steps": 0, "elapsed": 0.0, "max_logit": "-inf", "clipped_steps": 0},
        "vocab_size": released.config.vocab_size,
        "data": {
            "dataset": "none",
            "tokenizer": hashlib.sha256(definition.encode()).hexdigest(),
            "next_sample": 0,
            "tokens": {},
        },
        "config": to_dict(config),
        "machine": {
            "processes": 1,
            "zero_stage": 1,
            "expert_parallel": 1,
            "imported": str(released.path),
            "k2train": k2train.__version__,
        },
    }
