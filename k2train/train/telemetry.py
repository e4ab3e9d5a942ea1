"""What a record tells beside the curves of a run: heads, layers, experts, sources, and where the time goes.

Heads, layers and experts are of the record's last step alone, so that a checkpoint has nothing to keep of them and
most steps pay nothing. Seconds are of all steps since the telemetry before. docs/metrics.md names all of it.

Shapes: L layers (in ``Norms`` all, the embedding and the head among them; else those with attention, or with experts),
H heads, E experts.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from k2train.config import TrackConfig
from k2train.plan.count import causal_keys, work
from k2train.train.engine import PRECISIONS
from k2train.train.peak import peak_flops
from k2train.train.phases import Step
from k2train.train.spectrum import weight_entropies
from k2train.train.state import RunState
from k2train.train.stopwatch import Stopwatch

DIGITS = 5  # of a number in a record of many


class Telemetry:
    """Measures the steps that are due; every rank has one, and all call its methods together."""

    def __init__(self, config: TrackConfig, state: RunState, clock: Stopwatch, *, precision: str) -> None:
        """Has seen nothing.

        Args:
            config: how often.
            state: of the run.
            clock: that the parts of the run are timed by.
            precision: of the products, fp32 or bf16.
        """
        self._every, self._spectrum_every = config.telemetry_every * config.log_every, config.spectrum_every
        self._state, self._clock, self._last = state, clock, state.plan.steps
        self.asked = 0  # a step that has telemetry whatever its number
        self._norms = Norms(state)
        self._loads_LE: Tensor | None = None
        self._found_LH: Tensor | None = None
        self._grad_norm: float | Tensor | None = None  # None: the step was not applied
        self._steps = self._work = 0.0  # since the telemetry before
        if self._every:
            self._peak = peak_flops(state.world.device, PRECISIONS[precision])
            state.optimizer.register_step_pre_hook(lambda *_: clock.start("optimizer"))
            state.optimizer.register_step_post_hook(lambda *_: clock.stop("optimizer"))

    def due(self, step: int) -> bool:
        """Whether the record after so many steps has telemetry; the last one has, and one that is ``asked`` for."""
        return self._every > 0 and (step % self._every == 0 or step in (self._last, self.asked))

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        """A step is taken inside."""
        due, optimizer = self.due(step.number + 1), self._state.optimizer
        if due:
            self._norms.clear()
            optimizer.watch = self._norms.add
        try:
            with self._clock.part("step"), self._clock.waits("communication"):
                yield
        finally:
            optimizer.watch = None
        self._steps += 1
        if self._every:
            keys = causal_keys(step.phase.sequence_length)
            self._work += step.tokens * work(self._state.model.config, keys=keys).training

    def observe(self, loads_LE: Tensor | None, *, applied: bool, grad_norm: float | Tensor) -> None:
        """At the end of a step, before what was counted for it is forgotten.

        Args:
            loads_LE: tokens that each expert got, over all ranks; None without experts.
            applied: whether the step was. Of one that was not there are no norms.
            grad_norm: of all gradients, before clipping.
        """
        if self._state.optimizer.watch is None:
            return
        self._loads_LE, self._grad_norm = loads_LE, grad_norm if applied else None
        self._found_LH = pad_sequence(
            [layer.found_logits for _, layer in self._state.model.attention_layers()],
            batch_first=True,
            padding_value=-math.inf,
        )

    def take(self) -> dict[str, Any]:
        """Of the last step, if it is due, fit for JSON; else nothing."""
        step = self._state.progress.step
        if not self.due(step):
            return {}
        found = self._machine()
        found |= self._heads()
        found |= self._norms.take(float(self._grad_norm)) if self._grad_norm is not None else {}
        if self._loads_LE is not None:
            found |= experts(self._loads_LE, [name for name, _ in self._state.model.moe_layers()])
        found["source_tokens"] = self._state.stream.tokens_seen(self._state.next_sample)
        if self._spectrum_every and (step % self._spectrum_every == 0 or step == self._last):
            found["weight_entropy"] = _short(weight_entropies(self._state))
        return found

    def _heads(self) -> dict[str, Any]:
        clip, found_LH = self._state.clip, self._found_LH
        assert found_LH is not None, "observe comes first"
        if self._state.world.size > 1:
            dist.all_reduce(found_LH, dist.ReduceOp.MAX)
        heads = {
            "head_max_logit": clip.max_logits,
            "head_max_logit_exact": (found_LH >= clip.max_logits).int(),
            "head_clip": clip.gamma,
            "head_scale": clip.cumulative,
        }
        rows = [(layer_of(name), len(layer.max_logits)) for name, layer in clip.layers]
        return {
            key: {name: _short(values[:number]) for (name, number), values in zip(rows, tensor.tolist(), strict=True)}
            for key, tensor in heads.items()
        }

    def _machine(self) -> dict[str, Any]:
        """Speed and memory; the time of this rank, the memory of the one that has used most."""
        world, seconds = self._state.world, self._clock.take()
        memory = torch.tensor(peak_memory(world.device), dtype=torch.float64, device=world.device)
        if world.size > 1:
            dist.all_reduce(memory, dist.ReduceOp.MAX)
        speed = self._work / seconds["step"] / world.size
        found = {
            "utilisation": _short(speed / self._peak),
            "memory": int(memory),
            "seconds": _short({part: total / self._steps for part, total in sorted(seconds.items())}),
        }
        self._steps = self._work = 0.0
        return found


class Norms:
    """Root mean squares by layer, from the shards of all ranks: each element of a parameter lies on one of them."""

    def __init__(self, state: RunState) -> None:
        """Looks up what lies where."""
        self._state, self._device = state, state.world.device
        self._layers = list(dict.fromkeys(map(layer_of, state.roles)))
        place = {name: number for number, name in enumerate(self._layers)}
        self._elements = torch.zeros(len(self._layers), dtype=torch.float64)
        for name, shape in state.shapes().items():
            if name in state.roles:  # not a router bias, which is a buffer
                self._elements[place[layer_of(name)]] += math.prod(shape)
        self._pieces = {
            shard.flat: (
                [slice(piece.offset, piece.offset + piece.stop - piece.start) for piece in shard.pieces],
                torch.tensor([place[layer_of(piece.name)] for piece in shard.pieces], dtype=torch.int64),
            )
            for shard in state.held
        }
        self.clear()

    def clear(self) -> None:
        """Forgets what was added."""
        self._sums = torch.zeros(2, len(self._layers), dtype=torch.float64, device=self._device)

    @torch.no_grad()
    def add(self, flat: Tensor, grad: Tensor, update: Tensor) -> None:
        """A shard was stepped: adds the squares of its gradient and of its update; see ``MuonClip.watch``."""
        self._sums += self._squares(flat, grad, update)

    def _squares(self, flat: Tensor, *values: Tensor) -> Tensor:
        """[len(values), L] sums of the squares of tensors that are laid out as a shard is, float64."""
        cuts, layers = self._pieces[flat]
        sums = torch.zeros(len(values), len(self._layers), dtype=torch.float64, device=self._device)
        if cuts:
            norms = torch.stack(torch._foreach_norm([tensor[cut] for tensor in values for cut in cuts]))
            squares = norms.to(self._device, torch.float64).square().view(len(values), -1)
            sums.index_add_(1, layers.to(self._device), squares)
        return sums

    @torch.no_grad()
    def take(self, grad_norm: float) -> dict[str, Any]:
        """What was added, over all ranks.

        Args:
            grad_norm: of all gradients before clipping, which has scaled all that was added by one factor.
        """
        weights = torch.stack([self._squares(flat, flat.detach()) for flat in self._pieces]).sum(0)
        sums = torch.cat([self._sums, weights])
        if self._state.world.size > 1:
            dist.all_reduce(sums)
        sums = sums.cpu()
        clipped = float(sums[0].sum().sqrt())
        gradient = sums[0].sqrt() * (grad_norm / clipped if clipped > 0 else 1.0)
        found = {
            "layer_grad_norm": gradient,
            "layer_update_rms": (sums[1] / self._elements).sqrt(),
            "layer_weight_rms": (sums[2] / self._elements).sqrt(),
        }
        return {key: _short(dict(zip(self._layers, row.tolist(), strict=True))) for key, row in found.items()}


def experts(loads_LE: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """How evenly the routers of a step have chosen, by layer.

    Args:
        loads_LE: tokens that each expert got.
        names: of the layers.
    """
    wide_LE = loads_LE.double().cpu()
    share_LE = wide_LE / wide_LE.sum(1, keepdim=True)
    relative_LE = share_LE * wide_LE.shape[1]
    rows = {
        "expert_load": relative_LE,
        "expert_max_violation": relative_LE.amax(1) - 1,  # arXiv 2408.15664, section 3.2: MaxVio
        "expert_dead": (wide_LE == 0).double().mean(1),
        "expert_entropy": -torch.xlogy(share_LE, share_LE).sum(1) / math.log(max(wide_LE.shape[1], 2)),
    }
    layers = list(map(layer_of, names))
    return {key: _short(dict(zip(layers, values.tolist(), strict=True))) for key, values in rows.items()}


def layer_of(name: str) -> str:
    """The layer of a parameter or a module, as in records: ``layers.3``, or ``embed_tokens``, ``norm``, ``lm_head``."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has used at most: of the GPU if it has one, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB, macOS in bytes
    return used * (1 if sys.platform == "darwin" else 1024)


def _short(value: Any) -> Any:
    """With five digits, which keeps records of many numbers small; null for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, int):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
