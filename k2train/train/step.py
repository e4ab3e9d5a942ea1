"""One optimizer step: micro-batches forward and backward, the decision, the update, the routers' biases.

Shapes: B sequences of a micro-batch, T tokens, L layers, H heads, E experts.

The loss is the mean over all tokens of the global batch that are to be predicted, wherever they lie: each rank sums the
loss of its tokens and divides by the global number, so that neither micro-batches nor processes have a weight of their
own. A step with a NaN or an infinity anywhere (a loss, a largest logit, a gradient, on one rank alone) is applied on no
rank and leaves no trace in weights, momenta, moments, router biases or the clip's state. So it is with one that the
monitor refuses. What moves on is the step's number, and with it the data and the learning rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from muonclip import QKClip
from torch import Tensor

from k2train.comm import World, sum_across
from k2train.data.reader import Batch
from k2train.model import SequenceParallel, Transformer, update_bias
from k2train.monitor import Decision, Finding, Monitor
from k2train.train.documents import DocumentLosses
from k2train.train.metrics import Meter
from k2train.train.own_optimizer import AnyOptimizer
from k2train.train.phases import Step
from k2train.train.stopwatch import Stopwatch
from k2train.train.telemetry import Telemetry
from k2train.train.veto import deciding
from k2train.train.watchdog import beat
from k2train.train.zero import forget_gradients


class Stepper:
    """Takes the steps of a plan; every rank has one and calls it for the same steps."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        model: Transformer,
        optimizer: AnyOptimizer,
        clip: QKClip,
        *,
        batches: Callable[[Step], Sequence[Batch]],
        document_mask: bool,
        meter: Meter,
        monitor: Monitor,
        telemetry: Telemetry,
        clock: Stopwatch,
        world: World,
        sequence_parallel: SequenceParallel | None,
    ) -> None:
        """Joins what a step needs.

        Args:
            engine: DeepSpeed's, around model and optimizer.
            model: what is trained.
            optimizer: its parameter groups have ``peak_lr``.
            clip: gathers the largest logits, also where nothing is clipped.
            batches: gives this rank's micro-batches of a step: tokens, labels, and where documents begin.
            document_mask: whether attention stays inside a document.
            meter: is told what happened.
            monitor: may refuse an update.
            telemetry: is shown what is forgotten at the end of a step.
            clock: times the parts of a step.
            world: the run's processes.
            sequence_parallel: those that share out sequences, of which micro-batches then are parts.
        """
        self._sequence_parallel = sequence_parallel
        self.engine, self.model, self.optimizer, self.clip = engine, model, optimizer, clip
        self._batches, self._meter, self._monitor, self._world = batches, meter, monitor, world
        self._telemetry, self._clock = telemetry, clock
        self.documents, self._document_mask = DocumentLosses(world), document_mask
        self._decision: Decision | None = None  # of the monitor, on the step under way
        self._rate = model.config.router_bias_rate
        self._attention = [layer for _, layer in model.attention_layers()]
        self._gates = [moe.gate for _, moe in model.moe_layers()]
        self.loads_LE: Tensor | None = None  # tokens that each expert got in the last step, on all ranks
        self._shape: tuple[int, int, int] | None = None  # of the last step: phase, samples, sequences of a micro-batch

    def take(self, step: Step, *, before_update: Callable[[], None]) -> Decision:
        """Takes the step; returns whether it was applied, and what was out of the ordinary.

        Args:
            step: of the plan.
            before_update: is called when the gradients are there.
        """
        begin = time.perf_counter()
        self._prepare(step)
        with self._clock.part("data"):
            batches = self._batches(step)
        self.documents.begin(expected=self._monitor.expected_loss)
        with self._clock.part("forward_backward"):
            nats, targets, balance, healthy = self._gradients(batches, step.number)
        before_update()
        beat(f"step {step.number + 1}: update")
        self.clip.gather()
        self._decision = None
        refuses = partial(self._refuses, step, nats, targets, self.documents.worst())
        with deciding(self.engine.optimizer, refuses), self._clock.part("update"):
            self.engine.step()
        applied = bool(self.engine.was_step_applied())  # the host knows: DeepSpeed has waited for its own check
        loads_LE = self._balance(applied=applied)
        self._telemetry.observe(loads_LE, applied=applied, grad_norm=self.engine.get_global_grad_norm())
        fallbacks = torch.stack([layer.max_logit_fallbacks for layer in self._attention]).sum()
        self.clip.reset()
        if applied:
            clipped = (self.clip.gamma < 1).sum()
            first = self._world.main  # whose sums also hold what all ranks know
            self._meter.add(
                sums={
                    "nats": nats,
                    "targets": targets,
                    "balance_loss": balance,
                    "max_logit_fallbacks": fallbacks,
                    "clipped_steps": (clipped > 0) * first,
                },
                largest={
                    "grad_norm": torch.as_tensor(self.engine.get_global_grad_norm()),
                    "max_logit": self.clip.max_logits.max(),
                    "clipped_heads": clipped,
                    "balance_max": self._imbalance(loads_LE),
                },
            )
        else:
            forget_gradients(self.engine.optimizer)
        decision = self._decision or (Decision(apply=True) if applied else self._not_finite(nats, healthy))
        self._meter.count(applied=applied, tokens=step.tokens, seconds=time.perf_counter() - begin)
        assert decision.apply == applied
        return decision

    def _prepare(self, step: Step) -> None:
        """Learning rate, size and positions of the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * step.lr_ratio
        phase = step.phase
        if (shape := (phase.index, step.samples, phase.micro_batch_size)) == self._shape:
            return
        self._shape = shape
        self.model.set_rope_scaling(phase.rope_scaling)
        self.engine.set_train_micro_batch_size(phase.micro_batch_size)
        # To DeepSpeed a part of a sequence is a sequence: gradients are summed over all processes in any case.
        sharing = 1 if self._sequence_parallel is None else self._sequence_parallel.size
        self.engine.set_train_batch_size(step.samples * sharing)
        # DeepSpeed finds a step's last micro-batch by the remainder of this count.
        self.engine.micro_steps = 0
        if hasattr(self.engine.optimizer, "gradient_accumulation_steps"):  # decides what offloading keeps
            self.engine.optimizer.gradient_accumulation_steps = self.engine.gradient_accumulation_steps()

    def _gradients(self, batches: Sequence[Batch], index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Forward and backward; this rank's nats, targets and share of the balance loss, and whether all was finite."""
        device, world = self._world.device, self._world
        targets = torch.tensor(sum(int((labels >= 0).sum()) for _, labels, _ in batches), device=device)
        everywhere = targets.clone()
        dist.all_reduce(everywhere)
        weight = world.size / everywhere.clamp(min=1)  # DeepSpeed takes the mean over ranks
        nats, balance = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        healthy = torch.ones((), dtype=torch.bool, device=device)
        self.model.train()
        for number, (tokens_BT, labels_BT, starts_BT) in enumerate(batches):
            beat(f"step {index + 1}: forward and backward")
            # Pinned where there is a GPU, so that the copies do not wait for what is computed before them.
            assert starts_BT is not None, "documents have losses of their own"
            tokens, labels, starts = (each.to(device, non_blocking=True) for each in (tokens_BT, labels_BT, starts_BT))
            loss_BT, part = self.engine(
                tokens, labels, starts if self._document_mask else None, self._sequence_parallel
            )
            loss = loss_BT.sum() * weight + part / len(batches)
            largest = torch.cat([layer.max_logits for layer in self._attention]).amax()
            healthy &= torch.isfinite(loss.detach()) & (largest < math.inf)  # false for a NaN too
            # Gradients may be finite where the loss is not. DeepSpeed looks at gradients: so they are made to tell.
            self.engine.backward(loss * torch.where(healthy, 1.0, math.nan), scale_wrt_gas=False)
            nats += loss_BT.detach().sum(dtype=torch.float64)
            first = 0 if self._sequence_parallel is None else self._sequence_parallel.part(starts.shape[1]).start
            self.documents.add(loss_BT.detach(), labels, starts, first=first)
            balance += part.detach() / (len(batches) * world.size)
            if number + 1 < len(batches):
                self.engine.step()  # DeepSpeed counts micro-batches by it; the update comes with the last one
        return nats, targets, balance, healthy

    def _balance(self, *, applied: bool) -> Tensor | None:
        """Moves each router's selection bias by the global loads, and returns them; None without experts.

        DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). A step that was not applied moves nothing.
        """
        if not self._gates:
            return None
        loads_LE = torch.stack([gate.loads for gate in self._gates])
        dist.all_reduce(loads_LE)
        self.loads_LE = loads_LE
        for gate, loads_E in zip(self._gates, loads_LE, strict=True):
            if applied:
                bias = gate.e_score_correction_bias
                bias.copy_(update_bias(bias, loads_E, rate=self._rate))
            gate.loads.zero_()
        return loads_LE

    def _imbalance(self, loads_LE: Tensor | None) -> Tensor:
        """The largest load over the mean one, of the layer where that is most."""
        if loads_LE is None:
            return torch.ones((), device=self._world.device)
        wide_LE = loads_LE.double()
        return (wide_LE.amax(1) / wide_LE.mean(1)).max()

    def _refuses(self, step: Step, nats: Tensor, targets: Tensor, worst: Tensor, norm: float | Tensor) -> bool:
        """Whether the update must not happen; called by all ranks, which decide from the same bits.

        This is where the host waits for the device, once: the loss comes with the norm.
        """
        world = self._world
        nats_all, targets_all, *same = sum_across([nats, targets, torch.as_tensor(norm), worst], device=world.device)
        grad_norm, document = (each / world.size for each in same)
        if not math.isfinite(grad_norm) or grad_norm < 0:  # of which DeepSpeed makes -1 here and there
            return True
        if targets_all:
            loss = nats_all / targets_all
            self._decision = self._monitor.decide(
                loss=loss, grad_norm=grad_norm, document=document, phase=step.phase.index
            )
        return self._decision is not None and not self._decision.apply

    def _not_finite(self, nats: Tensor, healthy: Tensor) -> Decision:
        """Why DeepSpeed has updated nothing; called by all ranks, in the rare step of which that is true."""
        bad_loss, unhealthy = sum_across([~torch.isfinite(nats), ~healthy], device=self._world.device)
        heads = int(self.clip.invalid.sum())
        signal = "loss" if bad_loss else "max_logit" if unhealthy and heads else "grad_norm"
        return Decision(apply=False, findings=(Finding(signal, math.nan, math.nan, math.inf),))
