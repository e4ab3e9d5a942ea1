"""All that decides a run's future, as a checkpoint holds it: masters, momenta, router biases and a few numbers.

Nothing else is state: a sample follows from its number, a step's samples from the step, the learning rate from the
step. Training draws no random numbers after the weights' start; the generators are kept for what a user adds to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import deepspeed
import torch
from muonclip import QKClip
from muonclip.plan import Piece

from k2train.checkpoint import Checkpoint, CheckpointError, Interval
from k2train.comm import World, pack_json, unpack_json
from k2train.data import TrainStream
from k2train.model import Transformer
from k2train.train import zero
from k2train.train.own_optimizer import AnyOptimizer, OwnOptimizer, laid_out
from k2train.train.phases import Plan
from k2train.train.randomness import generator_states, seed_generators, set_generator_states
from k2train.train.zero import Shard, whole_shape


@dataclass
class Progress:
    """How far the run is; written into each checkpoint and read back on resume."""

    step: int = 0  # optimizer steps asked for; a step of the schedule and of the data whether it was applied or not
    skipped_steps: int = 0  # steps whose gradient was not finite: no update happened
    elapsed: float = 0.0  # seconds in the training loop, all starts together
    max_logit: float = float("-inf")  # the largest attention logit of any step
    clipped_steps: int = 0  # steps in which QK-Clip acted on some head
    rewinds: int = 0  # how often the run has gone back to a checkpoint


@dataclass(frozen=True)
class Experts:
    """Where this rank's stacked expert parameters lie in the global ones."""

    rank: int  # in the expert-parallel group
    size: int

    def start(self, piece: Piece, *, expert: bool) -> int:
        """The first element of a piece in the flattened global parameter."""
        return piece.start + (self.rank * _numel(piece.shape) if expert else 0)

    def shape(self, shape: tuple[int, ...], *, expert: bool) -> tuple[int, ...]:
        """The global shape of a parameter of this rank's ``shape``."""
        return (shape[0] * self.size, *shape[1:]) if expert else shape


class Stateful(Protocol):
    """A part of the run that remembers something from step to step, fit for JSON."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""


@dataclass
class RunState:
    """The parts of a run that a checkpoint holds."""

    model: Transformer
    engine: deepspeed.DeepSpeedEngine
    optimizer: AnyOptimizer
    clip: QKClip
    held: list[Shard]  # of masters and momenta by this rank
    experts: Experts
    world: World
    stream: TrainStream
    plan: Plan
    vocab_size: int
    progress: Progress = field(default_factory=Progress)
    hooks: Mapping[str, Stateful] = field(default_factory=dict)  # by name

    def __post_init__(self) -> None:
        """Asks the model once what each parameter is for."""
        self.roles = self.model.parameter_roles()

    @property
    def next_sample(self) -> int:
        """Number of the first sample of the next step."""
        return self.plan.samples_before(self.progress.step)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every parameter and router bias."""
        return shapes(self.model, self.roles, self.experts)

    def intervals(self) -> list[Interval]:
        """What this rank writes of the global tensors, and what it keeps of its own.

        Router biases are the same everywhere: rank 0 writes them. Its hooks' state is in ``state_dict``.
        """
        found = list(intervals(self.held, self.optimizer, self.roles, self.experts))
        own = _rank_name(self.world)
        if self.world.main:
            found += [Interval(name, "buffer", 0, bias) for name, bias in router_biases(self.model)]
        else:
            found.append(Interval(own, "hooks", 0, pack_json(self._hook_states())))
        return [*found, Interval(own, "generators", 0, generator_states(self.world.device))]

    def state_dict(self) -> dict[str, Any]:
        """All else that decides the future, fit for JSON."""
        return {
            "progress": asdict(self.progress) | {"max_logit": repr(self.progress.max_logit)},
            "optimizer_steps": optimizer_steps(self.optimizer),
            "qk_clip": {name: scales.tolist() for name, scales in self.clip.state_dict().items()},
            "vocab_size": self.vocab_size,
            "data": self.stream.state_dict(self.next_sample),
            "hooks": self._hook_states(),
        }

    def load(self, checkpoint: Checkpoint, *, same_world: bool, seed: int) -> None:
        """Becomes what the checkpoint holds, in place.

        Args:
            checkpoint: of the same model.
            same_world: whether it was written by as many processes; else the random generators, which belong to a
                process, begin anew, and all hooks take the state of rank 0's.
            seed: that they then begin with.

        Raises:
            CheckpointError: it is of another model, which is found before anything is written; or of another version.
        """
        saved = checkpoint.manifest.state
        load_intervals(checkpoint, self.held, self.optimizer, self.model, self.roles, self.experts)
        set_optimizer_steps(self.optimizer, saved["optimizer_steps"])
        self.clip.load_state_dict({name: torch.tensor(scales) for name, scales in saved["qk_clip"].items()})
        zero.refresh_weights(self.engine.optimizer, self.held)
        progress = Progress(**(saved["progress"] | {"max_logit": float(saved["progress"]["max_logit"])}))
        for each in fields(Progress):
            setattr(self.progress, each.name, getattr(progress, each.name))
        self.engine.global_steps = self.progress.step
        self.engine.global_samples = self.next_sample
        states, own = saved["hooks"], _rank_name(self.world)
        if same_world:
            set_generator_states(checkpoint.reader.read(own, "generators"), self.world.device)
            if not self.world.main:
                states = unpack_json(checkpoint.reader.read(own, "hooks"))
        else:
            seed_generators(seed, rank=self.world.rank, step=self.progress.step)
        for name, hook in self.hooks.items():
            if name in states:
                try:
                    hook.load_state_dict(states[name])
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    raise CheckpointError(
                        f"{checkpoint.folder} has a state of {name!r} that this version of it does not read "
                        f"({error!r}): finish the run with the k2train and the hooks that wrote it, or begin a new one "
                        "with init_from"
                    ) from error

    def _hook_states(self) -> dict[str, Any]:
        return {name: hook.state_dict() for name, hook in self.hooks.items()}

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Takes over the weights and router biases of a checkpoint, and nothing else.

        Raises:
            CheckpointError: it is of another model; found before anything is written.
        """
        load_intervals(checkpoint, self.held, None, self.model, self.roles, self.experts)
        zero.refresh_weights(self.engine.optimizer, self.held)


def _rank_name(world: World) -> str:
    return f"rank-{world.rank:05d}"


def momenta(optimizer: AnyOptimizer, shard: Shard) -> dict[str, torch.Tensor]:
    """The optimizer's tensors that are laid out as the parameters are; one's own may have none before a step."""
    state = optimizer.state.get(shard.flat, {})
    return {key: value for key, value in sorted(state.items()) if laid_out(value, shard.flat)}


def intervals(
    held: list[Shard], optimizer: AnyOptimizer, roles: Mapping[str, str], experts: Experts
) -> Iterator[Interval]:
    """What this rank holds of masters and momenta, by global name and global element."""
    for shard in held:
        sources = {"master": shard.flat, **momenta(optimizer, shard)}
        for piece in shard.pieces:
            start = experts.start(piece, expert=roles[piece.name] == "expert")
            for key, source in sources.items():
                yield Interval(piece.name, key, start, _cut(source, piece))


def shapes(model: Transformer, roles: Mapping[str, str], experts: Experts) -> dict[str, tuple[int, ...]]:
    """Global shape of every parameter and router bias."""
    found = {n: experts.shape(whole_shape(p), expert=roles[n] == "expert") for n, p in model.named_parameters()}
    return found | {name: tuple(bias.shape) for name, bias in router_biases(model)}


def router_biases(model: Transformer) -> list[tuple[str, torch.Tensor]]:
    """The router's selection biases, the one kind of buffer that is learnt."""
    return [
        (f"{name}.gate.e_score_correction_bias", moe.gate.e_score_correction_bias) for name, moe in model.moe_layers()
    ]


def load_intervals(
    checkpoint: Checkpoint,
    held: list[Shard],
    optimizer: AnyOptimizer | None,
    model: Transformer,
    roles: Mapping[str, str],
    experts: Experts,
) -> None:
    """Writes a checkpoint's numbers into masters, momenta and router biases, whatever layout they were saved from.

    Without the optimizer its momenta stay as they are.

    Raises:
        CheckpointError: it is of another model; found before anything is written.
    """
    _compare(checkpoint, shapes(model, roles, experts))
    reader = checkpoint.reader
    with torch.no_grad():
        for shard in held:
            targets = {"master": shard.flat}
            if isinstance(optimizer, OwnOptimizer):
                optimizer.make_room(shard.flat, _saved_momenta(checkpoint, shard))
            if optimizer is not None:
                targets |= momenta(optimizer, shard)
            for piece in shard.pieces:
                start = experts.start(piece, expert=roles[piece.name] == "expert")
                for key, target in targets.items():
                    reader.fill(piece.name, key, start, _cut(target, piece))
        for name, bias in router_biases(model):
            reader.fill(name, "buffer", 0, bias)


def _saved_momenta(checkpoint: Checkpoint, shard: Shard) -> dict[str, torch.dtype]:
    """What a checkpoint has of a shard beside masters; its parameters have the same keys."""
    names = {piece.name for pieces in shard.layout.pieces_by_rank for piece in pieces}
    found = {}
    for tensor, record in checkpoint.manifest.tensors.items():
        name, _, key = tensor.rpartition("/")
        if name in names and key != "master":
            found[key] = getattr(torch, record.dtype)
    return found


def _compare(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]]) -> None:
    there = {
        key.rsplit("/", 1)[0]: record.shape
        for key, record in checkpoint.manifest.tensors.items()
        if key.endswith(("/master", "/buffer"))
    }
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            raise CheckpointError(
                f"{checkpoint.folder} is of another model: {name} is {_describe(there.get(name))} there "
                f"and {_describe(wanted.get(name))} here"
            )


def _describe(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))


def _cut(flat: torch.Tensor, piece: Piece) -> torch.Tensor:
    return flat.detach()[piece.offset : piece.offset + piece.stop - piece.start]


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def optimizer_steps(optimizer: AnyOptimizer) -> dict[str, Any]:
    """Updates that each AdamW group has counted, by role; its bias correction needs them. Of one's own: all numbers."""
    if isinstance(optimizer, OwnOptimizer):
        return optimizer.scalars()
    return {
        group["role"]: int(optimizer.state[tensor]["step"])
        for tensor, group in optimizer.tensors()
        if group["algorithm"] == "adamw"
    }


def set_optimizer_steps(optimizer: AnyOptimizer, steps: Mapping[str, Any]) -> None:
    """The inverse of ``optimizer_steps``."""
    if isinstance(optimizer, OwnOptimizer):
        optimizer.set_scalars(steps)
        return
    for tensor, group in optimizer.tensors():
        if group["algorithm"] == "adamw":
            optimizer.state[tensor]["step"].fill_(steps[group["role"]])
