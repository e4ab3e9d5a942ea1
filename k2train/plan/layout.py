"""How a run is cut over ranks: DeepSpeed's optimizer, its flat tensors, and how many elements of them a rank has.

Two kinds of parameters: experts, of which a rank has E / ep, and which ranks ep apart have in common; and all others
("dense"), which are whole on every rank. ZeRO shares out, stage by stage, optimizer state, gradients and weights over
the ranks that have a parameter in common (arXiv 1910.02054, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from muonclip.plan import Piece, cut

from k2train.config import PlanConfig
from k2train.plan.count import Parameter, parameters

# DeepSpeed 0.19's defaults, which k2train leaves as they are: elements.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
REUSE_DISTANCE = 1_000_000_000
ALIGNMENT = 2  # elements, of each rank's part of a flat tensor at stages 1 and 2


@dataclass(frozen=True)
class Flat:
    """The parameters of one role as one rank sees them, in flat order, and the ranks that share them out."""

    role: str
    parameters: tuple[Parameter, ...]  # experts: those of one rank
    ranks: int  # that share them out
    stride: int  # between these ranks
    zero_stage: int

    @cached_property
    def elements(self) -> int:
        """Of a rank, without padding."""
        return sum(p.elements for p in self.parameters)

    @cached_property
    def padded(self) -> int:
        """Of the flat tensor at stages 1 and 2, of all parts at stage 3."""
        return self.ranks * self.shard

    @cached_property
    def shard(self) -> int:
        """Of one rank's part: stages 1 and 2 cut the whole flat tensor evenly, stage 3 each parameter."""
        if self.zero_stage == 3:
            return sum(-(-p.elements // self.ranks) for p in self.parameters)
        return ALIGNMENT * -(-self.elements // (ALIGNMENT * self.ranks))

    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """What each rank holds, as ``k2train.train.zero`` reads it off DeepSpeed."""
        sizes = [p.elements for p in self.parameters]
        if self.zero_stage < 3:
            offsets = accumulate(sizes, initial=0)
            laid_out = [(p.name, p.shape, offset) for p, offset in zip(self.parameters, offsets, strict=False)]
            return cut(laid_out, ranks=self.ranks, size=self.shard)
        parts = [-(-size // self.ranks) for size in sizes]
        offsets = accumulate(parts, initial=0)
        places = list(zip(self.parameters, parts, offsets, strict=False))
        return tuple(
            tuple(
                Piece(p.name, p.shape, rank * part, min((rank + 1) * part, p.elements), offset)
                for p, part, offset in places
                if rank * part < p.elements
            )
            for rank in range(self.ranks)
        )


@dataclass(frozen=True)
class Layout:
    """How a run of one config is cut."""

    config: PlanConfig
    found: tuple[Parameter, ...]  # of the whole model

    @property
    def ranks(self) -> int:
        """Processes, one a device."""
        return self.config.cluster.devices

    @property
    def zero_stage(self) -> int:
        """Of DeepSpeed."""
        return self.config.parallel.zero_stage

    @property
    def expert_parallel(self) -> int:
        """Ranks that share out the experts."""
        return self.config.parallel.expert_parallel

    @property
    def sequence_parallel(self) -> int:
        """Ranks that share out each sequence."""
        return self.config.parallel.sequence_parallel

    @property
    def on_gpu(self) -> bool:
        """Whether devices are GPUs."""
        return self.config.cluster.device == "cuda"

    @property
    def bf16(self) -> bool:
        """Whether the model computes in bfloat16 (``train.precision=auto``: on a GPU)."""
        precision = self.config.train.precision
        return precision == "bf16" or (precision == "auto" and self.on_gpu)

    @property
    def weight_bytes(self) -> int:
        """Of an element of a weight or an activation."""
        return 2 if self.bf16 else 4

    @property
    def whole_gradients(self) -> bool:
        """Whether DeepSpeed takes its ``BF16_Optimizer``, which has all gradients in fp32 on each rank."""
        return self.bf16 and self.zero_stage == 1 and not self.config.parallel.offload_optimizer

    @cached_property
    def flats(self) -> tuple[Flat, ...]:
        """The optimizer's groups, one a role in the order of the first parameter of each."""
        by_role: dict[str, list[Parameter]] = {}
        for p in self.found:
            by_role.setdefault(p.role, []).append(p)
        return tuple(self._flat(role, here) for role, here in by_role.items())

    def _flat(self, role: str, here: Sequence[Parameter]) -> Flat:
        if role != "expert":
            return Flat(role, tuple(here), self.ranks, 1, self.zero_stage)
        ep = self.expert_parallel
        own = tuple(replace(p, shape=(p.shape[0] // ep, *p.shape[1:])) for p in here)
        return Flat(role, own, self.ranks // ep, ep, self.zero_stage)

    @cached_property
    def local(self) -> tuple[Parameter, ...]:
        """A rank's parameters in the order of the model, with its share of the experts."""
        own = {p.name: p for flat in self.flats for p in flat.parameters}
        return tuple(own[p.name] for p in self.found)

    def persists(self, parameter: Parameter) -> bool:
        """Whether stage 3 leaves a parameter whole on every rank: vectors (``engine.deepspeed_config``)."""
        return parameter.elements <= self.config.model.hidden_size

    @property
    def buckets(self) -> int:
        """Buffers that gradients are gathered in for their reduction: a second one where that overlaps."""
        return 2 if self.on_gpu else 1


@dataclass(frozen=True)
class Step:
    """What a rank computes in one step."""

    micro_batches: int
    sequences: int  # of a micro-batch
    sequence_length: int  # tokens
    tokens: int  # of a micro-batch on one rank; sequence parallelism shares out each sequence

    @property
    def rank_tokens(self) -> int:
        """Of a rank in the step."""
        return self.micro_batches * self.tokens


def step_of(layout: Layout, *, batch: int, micro_batch: int, length: int) -> Step:
    """The step of a phase.

    Args:
        layout: of the run.
        batch: sequences a step, over all ranks.
        micro_batch: sequences that a rank computes at once.
        length: tokens of a sequence.
    """
    sp = layout.sequence_parallel
    return Step(batch * sp // (layout.ranks * micro_batch), micro_batch, length, micro_batch * length // sp)


def build_layout(config: PlanConfig) -> Layout:
    """The layout of a run; ``model.vocab_size`` must be a number."""
    return Layout(config, parameters(config.model))
