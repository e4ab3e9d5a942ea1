"""A run's checkpoints: when they are written, what becomes of old ones, and how a run that was stopped goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import safetensors
import torch

import k2train
from k2train.checkpoint import newest_checkpoint, prune, save_checkpoint
from k2train.comm import World
from k2train.config import RunConfig, to_dict
from k2train.train.errors import RunError
from k2train.train.state import RunState


class Saver:
    """Saves and resumes a run; every rank makes one and calls the same methods."""

    def __init__(
        self,
        state: RunState,
        *,
        config: RunConfig,
        folder: Path,
        machine: Mapping[str, Any],
        world: World,
        say: Callable[[str], None],
    ) -> None:
        """Touches nothing yet.

        Args:
            state: all that decides the run's future.
            config: of the run; the checkpoint keeps it.
            folder: of the run's checkpoints.
            machine: what may change the rounding of the run, from ``describe_machine``.
            world: the processes of the run.
            say: tells the person a sentence.
        """
        self.state, self.config, self.folder, self.machine = state, config, folder, machine
        self.world, self.say = world, say

    def save(self) -> None:
        """Writes and publishes a checkpoint of the present step; deletes those that are too old.

        Raises:
            OSError: on the rank that could not write; FailedTogether on the others. Nothing is published then.
        """
        save_checkpoint(
            self.folder,
            step=self.state.progress.step,
            intervals=self.state.intervals(buffers=self.world.main),
            shapes=self.state.shapes(),
            state=self.state.state_dict() | {"config": to_dict(self.config), "machine": self.machine},
            world=self.world,
        )
        if self.world.main:
            prune(self.folder, keep=self.config.checkpoint.keep)

    def wait(self) -> None:
        """Returns once the checkpoint that is being written, if one is, has been published."""

    def resume(self) -> None:
        """Loads the newest whole checkpoint if there is one.

        Raises:
            RunError: it belongs to another data set.
            CheckpointError: it belongs to another model.
        """
        checkpoint = newest_checkpoint(self.folder, world=self.world, say=self.say)
        if checkpoint is None:
            return
        saved = checkpoint.manifest.state
        if saved["dataset"] != self.state.dataset:
            raise RunError(
                f"{checkpoint.folder} was trained on another data set ({saved['dataset']}, now "
                f"{self.state.dataset}): the text, the tokenizer or Python changed. Give the run another name"
            )
        self.state.load(checkpoint)
        self.say(f"resuming from step {self.state.progress.step} of {self.config.steps} ({checkpoint.folder})")
        for key, now in self.machine.items():
            if (before := saved["machine"].get(key)) != now:
                self.say(
                    f"{key} was {before} and is now {now}: expect losses that agree to rounding, not to the last bit"
                )


def describe_machine(config: RunConfig, *, world: World, precision: str, threads: int) -> dict[str, Any]:
    """What may change the rounding of a run."""
    return {
        "processes": world.size,
        "expert_parallel": config.parallel.expert_parallel,
        "zero_stage": config.parallel.zero_stage,
        "device": world.device.type,
        "precision": precision,
        "threads": threads,
        "compile": config.train.compile,
        "micro_batch_size": config.train.micro_batch_size,
        "k2train": k2train.__version__,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }
