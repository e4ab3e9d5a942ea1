"""One run: assembled in a few lines, resumed if it was begun, trained step by step."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from muonclip.orthogonalize import cpu_multiplies_bfloat16

from k2train.comm import World, sum_across
from k2train.config import RunConfig
from k2train.data import DataPhase, Tokenizer, build_stream, open_dataset
from k2train.model import build_model, materialise, update_bias
from k2train.paths import RunPaths, atomic_write
from k2train.train import zero
from k2train.train.audit import OnceEach
from k2train.train.compile import Compiled
from k2train.train.engine import (
    PRECISIONS,
    build_clip,
    build_engine,
    build_optimizer,
    choose_precision,
    start_deepspeed,
)
from k2train.train.errors import RunError
from k2train.train.experts import DeepSpeedMoE, expert_groups, group_name, mark_experts
from k2train.train.metrics import MetricsFile
from k2train.train.saving import Saver, describe_machine
from k2train.train.schedule import lr_factor
from k2train.train.state import Experts, RunState
from k2train.train.validate import HeldOutLoss, Window, held_out_loss
from k2train.units import count


class Listener(Protocol):
    """Who is told how the run goes: the terminal, and trackers."""

    def step(self, record: dict[str, Any]) -> None:
        """The metrics of a step."""

    def validation(self, record: dict[str, Any]) -> None:
        """The loss on held-out text."""


class Trainer:
    """A run of ``config`` on the data set of ``manifest``; every rank makes one and calls the same methods."""

    def __init__(
        self, config: RunConfig, manifest: Path, *, world: World, paths: RunPaths, say: Callable[[str], None]
    ) -> None:
        """Builds model, optimizer, engine and data, and resumes from the newest whole checkpoint if there is one.

        Args:
            config: of the run.
            manifest: of the prepared data set.
            world: the processes of the run.
            paths: its folder.
            say: tells the person a sentence.

        Raises:
            RunError: the checkpoints of the run belong to another data set, or the vocabulary does not fit.
            CheckpointError: they belong to another model.
        """
        self.config, self.world, self.paths, self.say = config, world, paths, say
        self.listeners: Sequence[Listener] = ()
        self.threads = _set_threads(config.train.threads, world)
        self.precision = choose_precision(config.train.precision, world.device)
        self.dataset = open_dataset(manifest)
        model_config = dataclasses.replace(config.model, vocab_size=self._vocab_size())
        start_deepspeed(world)
        parallel = expert_groups(world, size=config.parallel.expert_parallel)

        # Shapes first: the optimizer needs no more, and at stage 3 no process ever holds all weights.
        self.model = build_model(
            model_config,
            seed=config.seed,
            dtype=PRECISIONS[self.precision],
            device="meta",
            expert_parallel=parallel if parallel.size > 1 else None,
            moe_class=DeepSpeedMoE,
        )
        mark_experts(self.model, parallel)
        self.model.checkpoint_activations(config.train.activation_checkpointing)
        self.compiled = Compiled(self.model, device=world.device) if config.train.compile else None
        self.clip = build_clip(config.optim, self.model)
        self.optimizer = build_optimizer(
            config.optim, self.model, self.clip, expert_group=group_name(parallel.size), device=world.device
        )
        materialise(
            self.model,
            device=world.device,
            seed=config.seed,
            config=model_config,
            first_expert=parallel.first_expert(model_config.n_routed_experts),
            placed=zero.partitioner(world.device) if config.parallel.zero_stage == 3 else None,
        )
        self.engine = build_engine(config, self.model, self.optimizer, world=world, precision=self.precision)
        shards = zero.shards(self.engine.optimizer, {p: n for n, p in self.model.named_parameters()})
        zero.hand_over(self.engine.optimizer, self.optimizer, shards)

        if world.main:  # with the run, so that its checkpoints can be used where the data set is not
            definition = self.dataset.folder / self.dataset.manifest["tokenizer"]["file"]
            atomic_write(paths.tokenizer, definition.read_bytes())
        phase = DataPhase(config.steps * config.train.global_batch_size, config.train.sequence_length)
        self.stream = build_stream(
            self.dataset, config.data, [phase], seed=config.seed, boundaries=config.train.document_mask
        )
        self.state = RunState(
            self.model,
            self.engine,
            self.optimizer,
            self.clip,
            shards,
            Experts(parallel.rank, parallel.size),
            world,
            self.stream,
            vocab_size=self._vocab_size(),
        )
        self.progress = self.state.progress
        self.saver = Saver(
            self.state,
            config=config,
            folder=paths.checkpoints,
            machine=describe_machine(config, world=world, precision=self.precision, threads=self.threads),
            world=world,
            say=say,
        )
        self._introduce()
        self.saver.resume()

    # ---- the loop

    def train(self, listeners: Sequence[Listener] = ()) -> HeldOutLoss:
        """Runs all steps that are left and returns the loss on the whole held-out split."""
        self.listeners = listeners
        metrics = MetricsFile(self.paths.metrics, resume_at=self.progress.step) if self.world.main else None
        every = self.config.checkpoint.every
        proof = OnceEach(self.engine, self.optimizer, self.model, self.state.experts)
        while self.progress.step < self.config.steps:
            self.saver.check()
            record = self.step()
            if self.compiled:
                self.compiled.check()
            proof.check(applied=record["applied"])
            step = self.progress.step
            last = step == self.config.steps
            if metrics and (step % self.config.track.log_every == 0 or last):
                metrics.write(record)
            for listener in self.listeners:
                listener.step(record)
            if self.config.validate.every and step % self.config.validate.every == 0 and not last:
                self._validate(metrics, whole=False)
            if last or (every and step % every == 0):
                self.saver.save()
        result = self._validate(metrics, whole=True)
        self.saver.wait()
        if metrics:
            metrics.close()
        return result

    def step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        config, clip = self.config, self.clip
        begin = time.perf_counter()
        factor = lr_factor(self.progress.step, steps=config.steps, schedule=config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        loss_sum, balance_sum = self._accumulate_gradients()
        clip.gather()
        self.engine.step()
        applied = bool(self.engine.was_step_applied())
        imbalance = self._update_router_bias(applied=applied)
        untold = torch.stack([layer.max_logit_fallbacks for _, layer in self.model.attention_layers()]).sum()
        clip.reset()
        max_logit, clipped, invalid = (
            v.item() for v in (clip.max_logits.max(), (clip.gamma < 1).sum(), clip.invalid.sum())
        )

        micro_batches = self._micro_batches() * self.world.size
        loss, balance, fallbacks = sum_across([loss_sum, balance_sum, untold], device=self.world.device)
        self.progress.step += 1
        seconds = time.perf_counter() - begin
        self.progress.elapsed += seconds
        self.progress.max_logit = max(self.progress.max_logit, max_logit)
        self.progress.clipped_steps += clipped > 0
        if not applied:
            self.progress.skipped_steps += 1
            self.say(f"step {self.progress.step}: the gradient is not finite, so nothing was updated")
        if invalid:
            self.say(
                f"step {self.progress.step}: the largest logit of {invalid} heads is not finite; they are not clipped"
            )
        tokens = config.train.global_batch_size * config.train.sequence_length
        return {
            "step": self.progress.step,
            "tokens": self.progress.step * tokens,
            "loss": loss / micro_batches,
            "bits_per_byte": loss
            / micro_batches
            / math.log(2)
            * self.dataset.tokens("train")
            / self.dataset.bytes("train"),
            "balance_loss": balance / micro_batches,
            "lr": config.optim.lr * factor,
            "grad_norm": float(self.engine.get_global_grad_norm()),
            "tokens_per_second": tokens / seconds,
            "max_logit": max_logit,
            "clipped_heads": clipped,
            "invalid_heads": invalid,
            "max_logit_fallbacks": int(fallbacks),  # heads whose largest logit the attention kernel did not tell
            "balance_max": imbalance,
            "applied": applied,
            "elapsed": self.progress.elapsed,
        }

    def _accumulate_gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of this rank's share of the step; sums of the micro-batches' mean losses."""
        device, size = self.world.device, self.config.train.micro_batch_size
        loss_sum, balance_sum = torch.zeros((), device=device), torch.zeros((), device=device)
        micro_batches = self._micro_batches()
        first = self.progress.step * self.config.train.global_batch_size
        self.model.train()
        for number in range(micro_batches):
            start = first + (number * self.world.size + self.world.rank) * size
            tokens_BT, labels_BT, starts_BT = self.stream.batch(range(start, start + size))
            starts = None if starts_BT is None else starts_BT.to(device)
            loss_BT, balance = self.engine(tokens_BT.to(device), labels_BT.to(device), starts)
            loss = loss_BT.mean()  # every position of a packed sample has a label
            self.engine.backward(loss + balance)
            loss_sum += loss.detach()
            balance_sum += balance.detach()
            if number + 1 < micro_batches:
                self.engine.step()  # DeepSpeed counts micro-batches by it; the update comes with the last one
        return loss_sum, balance_sum

    def _update_router_bias(self, *, applied: bool) -> float:
        """Moves each router's selection bias by the global loads; returns the largest load over the mean one.

        DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). A step that was not applied moves nothing.
        """
        gates = [moe.gate for _, moe in self.model.moe_layers()]
        if not gates:
            return 1.0
        loads_LE = torch.stack([gate.loads for gate in gates])
        dist.all_reduce(loads_LE)
        for gate, loads_E in zip(gates, loads_LE, strict=True):
            if applied:
                rate = self.config.model.router_bias_rate
                gate.e_score_correction_bias.copy_(update_bias(gate.e_score_correction_bias, loads_E, rate=rate))
            gate.loads.zero_()
        loads_LE = loads_LE.double()
        return float((loads_LE.amax(1) / loads_LE.mean(1)).max())

    def _validate(self, metrics: MetricsFile | None, *, whole: bool) -> HeldOutLoss:
        config = self.config
        windows: Sequence[Window] = self.dataset.windows("held_out", sequence_length=config.train.sequence_length)
        if not whole:  # evenly spread, so that a few windows still see all of the text
            number = min(len(windows), -(-config.validate.tokens // config.train.sequence_length))
            windows = [windows[i * len(windows) // number] for i in range(number)]
        found = held_out_loss(
            self.model,
            windows,
            bytes_of_token=_bytes_of_tokens(self.dataset.tokenizer),
            batch_size=config.train.micro_batch_size,
            document_mask=config.train.document_mask,
            world=self.world,
        )
        record = {
            "step": self.progress.step,
            "tokens": self.progress.step * config.train.global_batch_size * config.train.sequence_length,
            "validation_loss": found.per_token,
            "validation_bits_per_byte": found.bits_per_byte,
            "whole": whole,
        }
        if metrics:
            metrics.write(record)
        for listener in self.listeners:
            listener.validation(record)
        return found

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

    def peak_device_memory(self) -> int:
        """Bytes of GPU memory used at most; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.world.device) if self.world.device.type == "cuda" else 0

    def _introduce(self) -> None:
        total, active = self.parameters()
        world, parallel = self.world, self.config.parallel
        if self.precision == "bf16" and world.device.type == "cpu" and not cpu_multiplies_bfloat16():
            self.say("this CPU has no bfloat16 products: train.precision=fp32 is many times faster here")
        processes = f"{world.size} process{'es' if world.size > 1 else ''}"
        offload = " with offload" if parallel.offload_optimizer else ""
        threads = f" of {self.threads} threads" if world.device.type == "cpu" else ""
        attention = self.model.attention_layers()[0][1].backend(self.config.train.sequence_length)
        self.say(
            f"{self.config.name}: {count(total)} parameters, {count(active)} active a token; "
            f"{processes}{threads} on {world.device.type} in {self.precision}, {attention} attention; "
            f"ZeRO-{parallel.zero_stage}{offload}, expert parallelism {parallel.expert_parallel}; "
            f"{count(self.dataset.tokens('train'))} training tokens"
        )

    def _micro_batches(self) -> int:
        """That this rank computes for one step."""
        return self.config.train.global_batch_size // (self.config.train.micro_batch_size * self.world.size)

    def _vocab_size(self) -> int:
        wanted, there = self.config.model.vocab_size, self.dataset.padded_vocab_size
        if wanted is not None and wanted < self.dataset.tokenizer.vocab_size:
            raise RunError(
                f"model.vocab_size={wanted} is less than the {self.dataset.tokenizer.vocab_size} tokens of the "
                "tokenizer: raise it, or set it to null to follow the tokenizer"
            )
        return wanted or there


def _bytes_of_tokens(tokenizer: Tokenizer) -> torch.Tensor:
    """(V,) bytes of text that each token stands for; end_of_text stands for none."""
    ids = range(tokenizer.vocab_size)
    return torch.tensor([0 if i == tokenizer.end_of_text else len(tokenizer.decode_bytes([i])) for i in ids])


def _set_threads(threads: int | None, world: World) -> int:
    """Gives this process its share of the node's cores, or what the config says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // world.local_size))
    return torch.get_num_threads()
