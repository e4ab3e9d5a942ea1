"""One run: assembled in a few lines, resumed if it was begun, trained step by step."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from muonclip.orthogonalize import cpu_multiplies_bfloat16

from k2train.checkpoint import Checkpoint
from k2train.comm import World
from k2train.config import RunConfig
from k2train.data import Dataset, TrainStream, build_stream, open_dataset
from k2train.data.phases import Skips
from k2train.monitor import Decision, Drift, Monitor
from k2train.paths import RunPaths, atomic_write
from k2train.train.assemble import assemble
from k2train.train.best import Best
from k2train.train.deterministic import make_deterministic
from k2train.train.engine import choose_precision
from k2train.train.errors import RunError, TooManyRewinds
from k2train.train.evidence import evidence
from k2train.train.feed import Feed
from k2train.train.hooks import Hook, hook_name
from k2train.train.incidents import incident
from k2train.train.inject import Injector
from k2train.train.loop import run_loop
from k2train.train.metrics import Meter
from k2train.train.phases import Step, build_plan
from k2train.train.rewind import Rewind, Rewinds
from k2train.train.saving import Saver, describe_machine
from k2train.train.state import Experts, Progress, RunState
from k2train.train.step import Stepper
from k2train.train.stopwatch import Stopwatch
from k2train.train.telemetry import Telemetry, peak_memory
from k2train.train.validate import Validation, bytes_of_tokens, held_out_sets, loss_of_sets, prepared_apart
from k2train.units import count


class Trainer:
    """A run of ``config`` on the data set of ``manifest``; every rank makes one and calls the same methods."""

    def __init__(
        self,
        config: RunConfig,
        manifest: Path,
        *,
        world: World,
        paths: RunPaths,
        say: Callable[[str], None],
        hooks: Sequence[Hook] = (),
    ) -> None:
        """Builds model, optimizer, engine and data, and resumes from the newest whole checkpoint if there is one.

        Args:
            config: of the run.
            manifest: of the prepared data set.
            world: the processes of the run.
            paths: its folder.
            say: tells the person a sentence.
            hooks: what happens beside training.

        Raises:
            ConfigError: the parts of the schedule do not fit together.
            RunError: the checkpoints of the run, or the sets that it is validated on, belong to other data, or the
                vocabulary does not fit.
            DataError: the data set, or one that it is validated on, cannot be opened.
            CheckpointError: they belong to another model.
        """
        self.config, self.world, self.paths, self.say = config, world, paths, say
        self.plan, self.hooks = build_plan(config), hooks
        if config.train.deterministic:
            make_deterministic()
        self.threads = _set_threads(config.train.threads, world)
        self.precision = choose_precision(config.train.precision, world.device)
        self.dataset = open_dataset(manifest)
        # Of the first phase's length, so that they stay comparable.
        self._held_out = held_out_sets(
            self.dataset, prepared_apart(config), sequence_length=config.train.sequence_length
        )
        vocab_size = vocabulary_size(config, self.dataset)
        sized = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
        made = assemble(sized, world=world, precision=self.precision)
        self.model, self.compiled, self.clip = made.model, made.compiled, made.clip
        self.optimizer, self.engine, self._sequence_parallel = made.optimizer, made.engine, made.sequence_parallel

        if world.main:  # with the run, so that its checkpoints can be used where the data set is not
            definition = self.dataset.folder / self.dataset.manifest["tokenizer"]["file"]
            atomic_write(paths.tokenizer, definition.read_bytes())
        monitor = config.monitor
        self.rewinds = Rewinds(paths.rewinds, limit=monitor.rewinds, window=monitor.rewind_window)
        self.stream = self._build_stream()
        for note in self.stream.notes:
            say(note)
        progress = Progress()
        self.meter, self.best, self.monitor = Meter(progress, device=world.device), Best(), Monitor(monitor)
        self.incident: Mapping[str, Any] | None = None  # of the last step
        self.evidence: Mapping[str, Any] = {}  # on it, by the name of a file
        self._way_back: tuple[Rewind, Checkpoint] | None = None  # that it has asked for
        self.drift = Drift(tau=config.optim.tau)
        self.state = RunState(
            self.model,
            self.engine,
            self.optimizer,
            self.clip,
            made.shards,
            Experts(made.experts.rank, made.experts.size),
            world,
            self.stream,
            self.plan,
            vocab_size=vocab_size,
            progress=progress,
            hooks={
                "meter": self.meter,
                "best": self.best,
                "monitor": self.monitor,
                "drift": self.drift,
                **{hook_name(hook): hook for hook in hooks},
            },
        )
        self.progress = self.state.progress
        self._clock = Stopwatch(device=world.device, enabled=config.track.telemetry_every > 0)
        self.telemetry = Telemetry(config.track, self.state, self._clock, precision=self.precision)
        self.feed = Feed(self.stream, self.plan, world=world, sequence_parallel=self._sequence_parallel)
        self.stepper = Stepper(
            self.engine,
            self.model,
            self.optimizer,
            self.clip,
            batches=self.feed.take,
            document_mask=config.train.document_mask,
            meter=self.meter,
            monitor=self.monitor,
            telemetry=self.telemetry,
            clock=self._clock,
            world=world,
            sequence_parallel=self._sequence_parallel,
        )
        self._inject = Injector(
            self._planned_faults(),
            self.model,
            stream_number=lambda number: self.stream.samples.skips.stream_number(number),
            vocab_size=self.dataset.tokenizer.vocab_size,
            seed=config.seed,
            world=world,
        )
        self.saver = Saver(
            self.state,
            config=config,
            folder=paths.checkpoints,
            machine=describe_machine(config, world=world, precision=self.precision, threads=self.threads),
            world=world,
            say=say,
            published=self._published,
        )
        self._introduce()
        if done := self.rewinds.done:
            self.saver.forget(done[-1], rewinds=len(done))
        self.saver.resume()
        self.progress.rewinds = len(done)
        if taken := self.progress.step:  # a run of which the last validation alone is left takes no step that would
            self.model.set_rope_scaling(self.plan.step(taken - 1).phase.rope_scaling)
        self.saver.mark_best(self.best.step)

    # ---- what the loop does

    def train(self, *, received: Callable[[], int] = lambda: 0) -> Validation:
        """Runs all steps that are left; see ``run_loop``."""
        try:
            return run_loop(self, self.hooks, received=received)
        finally:
            self.feed.close()

    def step(self, *, before_update: Callable[[], None] = lambda: None) -> bool:
        """Takes the next step of the plan; returns whether it was applied."""
        due = self.plan.step(self.progress.step)
        with self._inject.during(due) as step, self.telemetry.during(step):
            decision = self.stepper.take(step, before_update=before_update)
        applied = decision.apply
        self._way_back = None
        if decision.rewind:
            self._way_back = self.rewinds.find(step, plan=self.plan, stream=self.stream, saver=self.saver)
        self.incident, self.evidence = None, {}
        if decision.findings:
            self.evidence = evidence(self, step)
            self.incident = self._incident(step, decision)
        if self.compiled:
            self.compiled.check()
        self.progress.step += 1
        self.progress.skipped_steps += not applied
        self.progress.elapsed += self.meter.last_seconds
        return applied

    def go_back(self) -> bool:
        """Goes back to a checkpoint if the last step has asked for it; whether it has. Called by all ranks together.

        Raises:
            TooManyRewinds: it would be once more than ``monitor.rewinds`` allows.
            CheckpointError: the checkpoint is damaged.
        """
        if self.incident is not None and self.incident["incident"]["action"] == "stopped":
            raise TooManyRewinds(
                f"step {self.incident['step']}: {self.incident['incident']['sentence']}. The run has gone back "
                f"{self.progress.rewinds} times, and monitor.rewinds allows no more: lower optim.lr, look at the "
                f"documents in {self.paths.incidents}, or go on with monitor.action=skip allow_changed=[monitor]"
            )
        if self._way_back is None:
            return False
        rewind, checkpoint = self._way_back
        self.rewinds.add(rewind, world=self.world)
        self.saver.forget(rewind, rewinds=len(self.rewinds.done))
        elapsed = self.progress.elapsed
        self.state.load(checkpoint, same_world=True, seed=self.config.seed)
        self.progress.elapsed, self.progress.rewinds = elapsed, len(self.rewinds.done)  # these do not go back
        self.stream = self.state.stream = self._build_stream()
        self.feed.follow(self.stream)
        self.saver.mark_best(self.best.step)
        return True

    def record(self) -> dict[str, Any]:
        """The metrics of the steps since the last record, and telemetry if it is due; called by all ranks together."""
        found, step = self.meter.take(), self.plan.step(self.progress.step - 1)
        loss = found["nats"] / found["targets"] if found["targets"] else math.nan
        applied = found["steps"] - found["skipped_steps"]
        text = self.dataset.tokens("train") / self.dataset.bytes("train")
        return {
            "step": self.progress.step,
            "steps": int(found["steps"]),  # that the record is of
            "skipped_steps": int(found["skipped_steps"]),  # of them; they count for nothing below
            "phase": step.phase.name,
            "tokens": step.tokens_after,
            "loss": loss,  # mean over the tokens of all these steps
            "bits_per_byte": loss / math.log(2) * text,
            "balance_loss": found["balance_loss"] / applied if applied else math.nan,
            "lr": self.config.optim.lr * step.lr_ratio,  # of the last step
            "grad_norm": found["grad_norm"],  # the largest, as the next ones
            "max_logit": found["max_logit"],
            "clipped_heads": int(max(0, found["clipped_heads"])),
            "balance_max": found["balance_max"],
            "max_logit_fallbacks": int(found["max_logit_fallbacks"]),  # heads whose kernel did not tell it; their sum
            "tokens_per_second": found["tokens"] / found["seconds"],
            "elapsed": self.progress.elapsed,
            **self.telemetry.take(),
        }

    def warnings(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What a record shows to go wrong slowly, each as it is written to metrics.jsonl."""
        return _warned(record, self.drift.observe(record, steps=self.plan.steps))

    def validate(self, *, whole: bool) -> Validation:
        """The loss on held-out text, of which hooks are told; called by all ranks together.

        Args:
            whole: read all of it; else ``validate.tokens`` of each set, evenly spread. After the last step those tell
                no more than how good the checkpoint is beside others: the whole, which follows, is what hooks are told.
        """
        with self._clock.part("validation"):
            result = self._validate(whole=whole)
        if not whole:
            self.best.note(self.progress.step, result.total.bits_per_byte)
            if self.progress.step == self.plan.steps:
                return result
        record = {
            "step": self.progress.step,
            "tokens": self.plan.tokens_before(self.progress.step),
            "validation_loss": result.total.per_token,
            "validation_bits_per_byte": result.total.bits_per_byte,
            "sets": result.per_set(),
            "whole": whole,
        }
        with self._clock.part("validation"):
            for hook in self.hooks:
                record |= hook.scores()
        for hook in self.hooks:
            hook.validation(record)
        for warning in _warned(record, self.drift.observe_validation(record)):
            for hook in self.hooks:
                hook.warning(warning)
        return result

    def _validate(self, *, whole: bool) -> Validation:
        config = self.config
        return loss_of_sets(
            self.model,
            self._held_out,
            windows=None if whole else -(-config.validate.tokens // config.train.sequence_length),
            bytes_of_token=self._bytes_of_token,
            batch_size=config.train.micro_batch_size,
            document_mask=config.train.document_mask,
            world=self.world,
            sequence_parallel=self._sequence_parallel,
        )

    def save(self) -> None:
        """Writes a checkpoint of the present step; called by all ranks together."""
        with self._clock.part("saving"):
            self.saver.wait()  # it may decide what is the best so far
            self.meter.fold()
            self.saver.save(best=self.best.claims(self.progress.step))

    def _published(self, step: int) -> None:
        self.best.saved(step)
        for hook in self.hooks:
            hook.saved(step)

    # ---- what becomes of a step that is out of the ordinary

    def _incident(self, step: Step, decision: Decision) -> dict[str, Any]:
        action, more = "logged" if decision.apply else "skipped", {}
        if self._way_back is not None:
            action, rewind = "rewound", self._way_back[0]
            more = {"rewind": len(self.rewinds.done) + 1, "to": rewind.to, "left_out": list(rewind.left_out)}
        elif decision.rewind and self.rewinds.used_up:
            action = "stopped"
        worst = {key: value for row in self.evidence["documents"][:1] for key, value in row.items() if key != "text"}
        return incident(step, decision, action=action, document=worst, **more)

    # ---- data

    def _build_stream(self) -> TrainStream:
        return build_stream(
            self.dataset,
            self.config.data,
            self.plan.data_phases(),
            seed=self.config.seed,
            boundaries=True,  # each document has a loss of its own, also where attention does not know of it
            rewound=[rewind.left_out for rewind in self.rewinds.done],
        )

    def _planned_faults(self) -> dict[int, str]:
        """The faults on purpose, by the first sample of their steps as they were before the run went back."""
        planned, before = Skips(self.config.data.order.skips), self.plan.samples_before
        return {
            planned.stream_number(before(int(step) - 1)): fault for step, fault in self.config.inject.faults.items()
        }

    @cached_property
    def _bytes_of_token(self) -> torch.Tensor:
        return bytes_of_tokens(self.dataset.tokenizer)

    # ---- small facts

    def parameters(self) -> tuple[int, int]:
        """How many there are in all, and how many are used for one token."""
        total = active = 0
        model = self.config.model
        roles = self.state.roles
        for name, shape in self.state.shapes().items():
            if name in roles:  # not a router bias, which is a buffer
                total += math.prod(shape)
                share = model.num_experts_per_tok / model.n_routed_experts if roles[name] == "expert" else 1
                active += round(math.prod(shape) * share)
        return total, active

    def peak_memory(self) -> int:
        """Bytes that this process has used at most: of GPU memory, or on a CPU of the host's."""
        return peak_memory(self.world.device)

    def _introduce(self) -> None:
        total, active = self.parameters()
        world, parallel = self.world, self.config.parallel
        if self.precision == "bf16" and world.device.type == "cpu" and not cpu_multiplies_bfloat16():
            self.say("this CPU has no bfloat16 products: train.precision=fp32 is many times faster here")
        processes = f"{world.size} process{'es' if world.size > 1 else ''}"
        offload = " with offload" if parallel.offload_optimizer else ""
        shared = f", sequence parallelism {parallel.sequence_parallel}" if parallel.sequence_parallel > 1 else ""
        threads = f" of {self.threads} thread{'s' if self.threads > 1 else ''}" if world.device.type == "cpu" else ""
        attention = self.model.attention_layers()[0][1].backend(self.config.train.sequence_length)
        self.say(
            f"{self.config.name}: {count(total)} parameters, {count(active)} active a token; "
            f"{processes}{threads} on {world.device.type} in {self.precision}, {attention} attention; "
            f"ZeRO-{parallel.zero_stage}{offload}, expert parallelism {parallel.expert_parallel}{shared}; "
            f"{count(self.dataset.tokens('train'))} training tokens"
        )
        if self.config.inject.allow:
            self.say("inject.allow=true: this run may be spoilt on purpose, to test what watches it")
        for line in self.plan.table(lr=self.config.optim.lr):
            self.say(line)


def vocabulary_size(config: RunConfig, dataset: Dataset) -> int:
    """Rows of the embedding: those of the config, or as the tokenizer has it.

    Raises:
        RunError: the tokenizer has more tokens than the model.
    """
    wanted = config.model.vocab_size
    if wanted is not None and wanted < dataset.tokenizer.vocab_size:
        raise RunError(
            f"model.vocab_size={wanted} is less than the {dataset.tokenizer.vocab_size} tokens of the "
            "tokenizer: raise it, or set it to null to follow the tokenizer"
        )
    return wanted or dataset.padded_vocab_size


def _warned(record: Mapping[str, Any], warnings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    about = {"step": record["step"], "tokens": record["tokens"]}
    return [about | {"incident": {"action": "warned", **warning}} for warning in warnings]


def _set_threads(threads: int | None, world: World) -> int:
    """Gives this process its share of the node's cores, or what the config says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // world.local_size))
    return torch.get_num_threads()
