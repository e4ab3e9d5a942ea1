"""A run's checkpoints: when they are written, what becomes of old ones, and how a run that was stopped goes on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

import k2train
from k2train.checkpoint import (
    Background,
    Checkpoint,
    CheckpointError,
    HostCopy,
    SaveError,
    find_checkpoint,
    folder_of,
    forget,
    mark_best,
    newest_checkpoint,
    open_checkpoint,
    prune,
    save_checkpoint,
    steps,
)
from k2train.comm import World, start_max, together
from k2train.config import RESUME, RunConfig, changed_settings, is_own, refuse_changes, to_dict
from k2train.data import DataError
from k2train.train.errors import RunError
from k2train.train.own_optimizer import find_optimizer
from k2train.train.randomness import seed_generators
from k2train.train.rewind import Rewind
from k2train.train.state import RunState

OWN_OPTIMIZER = "own optimizer"  # in what describes the machine


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
        published: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Touches nothing yet.

        Args:
            state: all that decides the run's future.
            config: of the run; the checkpoint keeps it.
            folder: of the run's checkpoints.
            machine: what may change the rounding of the run, from ``describe_machine``.
            world: the processes of the run.
            say: tells the person a sentence.
            published: is told the step of each checkpoint that has become whole, by all ranks at the same place.
        """
        self.state, self.config, self.folder, self.machine = state, config, folder, machine
        self.world, self.say, self._published = world, say, published
        self._in_flight: int | None = None
        self._copy, self._background = HostCopy(), Background()
        # The thread that writes agrees with those of other ranks while the main threads talk of something else.
        limit = timedelta(seconds=2 * config.faults.hang_after)  # as of the main ones
        self._group = dist.new_group(backend="gloo", timeout=limit) if world.size > 1 else None

    # ---- saving

    def save(self, *, best: bool = False) -> None:
        """Saves the present step: copies the state and writes it while training goes on (or at once, by the config).

        One save is in flight at a time: another waits for the one before.

        Args:
            best: marks this checkpoint as the best so far, which stays however old it gets.

        Raises:
            SaveError: the disk did not take the checkpoint before this one (or this one, if written at once); all
                ranks raise the same, the step is not saved, and another try is welcome.
            CheckpointError: the ranks do not see the same disk.
        """
        self.wait()
        step, checkpoint = self.state.progress.step, self.config.checkpoint
        intervals = self.state.intervals()
        values = self.state.state_dict() | {"config": to_dict(self.config), "machine": dict(self.machine)}
        if checkpoint.asynchronous:
            intervals = self._copy.take(intervals)
        shapes = self.state.shapes()

        def write() -> None:
            save_checkpoint(
                self.folder,
                step=step,
                intervals=intervals,
                shapes=shapes,
                state=values,
                world=self.world,
                group=self._group,
            )
            if self.world.main:
                if best:
                    mark_best(self.folder, step)
                since = time.time() - 3600 * checkpoint.keep_hours if checkpoint.keep_hours is not None else None
                prune(self.folder, keep=checkpoint.keep, every=checkpoint.keep_every, since=since)

        if checkpoint.asynchronous:
            self._background.start(write)
            self._in_flight = step
        else:
            write()
            self._published(step)

    def check(self) -> None:
        """Raises what went wrong with the save in flight once all ranks are through with it; to be called each step.

        Costs nothing while none is in flight.

        Raises:
            SaveError: the disk did not take it; on all ranks in the same step.
            CheckpointError: the ranks do not see the same disk.
        """
        if self._background.busy and not start_max(int(not self._background.done))():
            self.wait()

    def wait(self) -> None:
        """Returns once the checkpoint in flight, if one is, has been published. Raises as ``check`` does."""
        step, self._in_flight = self._in_flight, None
        self._background.wait()
        if step is not None:
            self._published(step)

    def mark_best(self, step: int) -> None:
        """Names the best checkpoint, if it is there: a kill may have come between its publication and its mark."""
        if self.world.main and folder_of(self.folder, step).exists():
            mark_best(self.folder, step)

    # ---- going back

    def newest(self, *, until: int) -> Checkpoint | None:
        """The newest whole checkpoint of at most ``until`` steps, the one in flight included; None if there is none."""
        try:
            self.wait()
        except SaveError as error:
            self.say(str(error))
        return newest_checkpoint(self.folder, world=self.world, say=self.say, until=until)

    def forget(self, rewind: Rewind, *, rewinds: int) -> None:
        """Deletes the checkpoints that the run has gone back behind.

        Args:
            rewind: the last one.
            rewinds: how many there have been; checkpoints that know of them all stay.
        """
        with together():
            if self.world.main:
                newer = [step for step in steps(self.folder) if step > rewind.to]
                forgotten = [step for step in newer if self._ignores(step, rewinds)]
                if forgotten:
                    forget(self.folder, forgotten, latest=rewind.to)
                    self.say(f"the checkpoints of the steps {', '.join(map(str, sorted(forgotten)))} are deleted")

    def _ignores(self, step: int, rewinds: int) -> bool:
        """Whether a checkpoint is from before the last of so many rewinds; a damaged one is left to ``resume``."""
        try:
            manifest = open_checkpoint(folder_of(self.folder, step)).manifest
        except CheckpointError:
            return False
        return int(manifest.state["progress"].get("rewinds", 0)) < rewinds

    # ---- going on

    def resume(self) -> None:
        """Brings the run to where ``resume`` and ``init_from`` say that it begins.

        Raises:
            RunError: there is no checkpoint and must be one, or the other way round; or it belongs to other settings,
                another data set or another tokenizer.
            CheckpointError: it belongs to another model, or none is whole.
        """
        config = self.config
        seed_generators(config.seed, rank=self.world.rank, step=0)
        own = newest_checkpoint(self.folder, world=self.world, say=self.say)
        if own is not None and config.resume == "never":
            raise RunError(
                f"resume=never, but {self.folder} holds checkpoints: take another name, as in name=second, or move "
                "them away"
            )
        found = own
        if own is None and config.resume not in RESUME:
            found = find_checkpoint(Path(config.resume).expanduser(), world=self.world, say=self.say)
        if found is not None:
            self._go_on(found)
            if own is not None:
                self._set_aside(newer_than=own)
        elif config.resume == "must":
            raise RunError(f"resume=must, but {self.folder} holds no checkpoint: resume=auto begins a new run")
        elif config.init_from is not None:
            self._begin_with(find_checkpoint(Path(config.init_from).expanduser(), world=self.world, say=self.say))

    def _go_on(self, checkpoint: Checkpoint) -> None:
        saved, config = checkpoint.manifest.state, self.config
        changes = changed_settings(saved["config"], to_dict(config))
        if refusal := refuse_changes(changes, allowed=config.allow_changed, what=str(checkpoint.folder)):
            raise RunError(refusal)
        self._check_optimizer(checkpoint)
        self._check_data(checkpoint)
        same_world = saved["machine"]["processes"] == self.world.size
        self.state.load(checkpoint, same_world=same_world, seed=config.seed)
        self.say(f"resuming from step {self.state.progress.step} of {self.state.plan.steps} ({checkpoint.folder})")
        for change in changes:
            self.say(change.sentence)
        for key, now in self.machine.items():
            if (before := saved["machine"].get(key, now)) != now:  # an older version may not have told it
                agreeing = "losses that agree to rounding, not to the last bit"
                losses = "other losses" if key == OWN_OPTIMIZER else agreeing
                self.say(f"{key} was {before} and is now {now}: expect {losses}")

    def _begin_with(self, checkpoint: Checkpoint) -> None:
        self._check_tokenizer(checkpoint)
        self.state.load_weights(checkpoint)
        self.say(f"beginning with the weights of step {checkpoint.manifest.step} of {checkpoint.folder}")

    def _check_optimizer(self, checkpoint: Checkpoint) -> None:
        then, now = checkpoint.manifest.state["config"]["optim"]["name"], self.config.optim.name
        if is_own(then) != is_own(now):
            raise RunError(
                f"{checkpoint.folder} holds what optim.name={then} remembers, which {now} cannot go on with: begin a "
                f"new run with its weights, as in name=second init_from={checkpoint.folder}"
            )

    def _check_data(self, checkpoint: Checkpoint) -> None:
        self._check_tokenizer(checkpoint)
        saved, step = checkpoint.manifest.state["data"], checkpoint.manifest.step
        if "data" not in self.config.allow_changed:
            try:
                self.state.stream.load_state_dict(saved)
            except DataError as error:
                raise RunError(
                    f"{checkpoint.folder}: {error}; to go on with the data that is there now: allow_changed=[data]"
                ) from error
        if saved["next_sample"] != (planned := self.state.plan.samples_before(step)):
            raise RunError(
                f"{checkpoint.folder} has read {saved['next_sample']} samples in {step} steps, and by the batch sizes "
                f"that are set now it would be {planned}, so that some would be repeated or left out: set them back"
            )

    def _check_tokenizer(self, checkpoint: Checkpoint) -> None:
        then, now = (
            state["tokenizer"] for state in (checkpoint.manifest.state["data"], self.state.stream.state_dict(0))
        )
        if then != now:
            raise RunError(
                f"{checkpoint.folder} was trained with the tokenizer {then}, to whose tokens its weights belong, and "
                f"here is {now}: take back the settings of data, or begin without its weights under another name"
            )

    def _set_aside(self, *, newer_than: Checkpoint) -> None:
        """Takes damaged checkpoints, which were passed over, out of the row: no later start is to look at them."""
        with together():
            if self.world.main:
                for step in steps(self.folder):
                    if step > newer_than.manifest.step:
                        folder = folder_of(self.folder, step)
                        aside = folder.with_name(f"{folder.name}.damaged-{int(time.time())}")
                        os.replace(folder, aside)
                        self.say(f"set aside as {aside}, to be looked at or deleted")


def describe_machine(config: RunConfig, *, world: World, precision: str, threads: int) -> dict[str, Any]:
    """What may change the rounding of a run; and which version of an optimizer of one's own trains it."""
    on_gpu = world.device.type == "cuda"
    own = {OWN_OPTIMIZER: find_optimizer(config.optim).identity} if config.optim.own else {}
    return own | {
        "processes": world.size,
        "expert_parallel": config.parallel.expert_parallel,
        "sequence_parallel": config.parallel.sequence_parallel,
        "zero_stage": config.parallel.zero_stage,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.machine(),
        "precision": precision,
        "threads": threads,
        "compile": config.train.compile,
        "micro_batch_size": config.train.micro_batch_size,
        "k2train": k2train.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "numpy": np.__version__,
    }
