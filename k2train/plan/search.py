"""Other ways of splitting the same run, ranked by time, and why those that are not among them are not."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from k2train.config import PlanConfig
from k2train.plan.estimate import Estimate, Part, estimate
from k2train.plan.exchange import Exchange, muon_exchange
from k2train.plan.layout import build_layout
from k2train.units import memory as as_text

STAGES = (1, 2, 3)
CHECKPOINTING = ("none", "selective", "full")
Rest = tuple[int, int, str]


@dataclass(frozen=True)
class Candidate:
    """A way of splitting a run."""

    zero_stage: int
    expert_parallel: int
    sequence_parallel: int
    micro_batch_size: int
    activation_checkpointing: str

    @property
    def rest(self) -> Rest:
        """All but micro-batch and sequence parallelism."""
        return self.zero_stage, self.expert_parallel, self.activation_checkpointing

    @property
    def overrides(self) -> tuple[str, ...]:
        """What to add to the command."""
        found = [
            f"parallel.zero_stage={self.zero_stage}",
            f"parallel.expert_parallel={self.expert_parallel}",
            f"train.micro_batch_size={self.micro_batch_size}",
            f"train.activation_checkpointing={self.activation_checkpointing}",
        ]
        if self.sequence_parallel > 1:
            found.insert(2, f"parallel.sequence_parallel={self.sequence_parallel}")
        return tuple(found)


@dataclass
class Reason:
    """Why some ways of splitting a run do not fit."""

    ways: int = 0
    least: float = math.inf  # bytes of a device, of the one among them that needs least


@dataclass(frozen=True)
class Found:
    """What a search has found."""

    tried: int
    fitting: Sequence[tuple[Candidate, Estimate]]  # fastest first
    closest: tuple[Candidate, Estimate] | None  # if none fits: the one that needs least memory
    reasons: Mapping[str, Reason]  # why the others do not fit


def search(config: PlanConfig, parts: Sequence[Part]) -> Found:
    """Tries ZeRO stages, expert and sequence parallelism, micro-batches and activation checkpointing.

    Muon's exchange is bounded, not planned, so that a candidate takes a millisecond. Not tried are micro-batches larger
    than one that does not fit, and sequences shared out further than needed.

    Args:
        config: of the run, whose cluster, batch and sequence length stay as they are.
        parts: of the run; all get the same micro-batch.
    """
    fitting, reasons, tried = [], defaultdict[str, Reason](Reason), 0
    closest: tuple[Candidate, Estimate] | None = None
    exchanges: dict[tuple[int, int], Exchange] = {}
    enough: dict[Rest, int] = {}  # ranks that share out a sequence, with which one fits
    too_large: set[tuple[Rest, int]] = set()
    for candidate in candidates(config, parts):
        rest, sharing = candidate.rest, candidate.sequence_parallel
        if enough.get(rest, sharing) < sharing or (rest, sharing) in too_large:
            continue
        tried += 1
        own, split = configured(config, candidate), (candidate.zero_stage, candidate.expert_parallel)
        if split not in exchanges:
            exchanges[split] = muon_exchange(build_layout(own), exact=False)
        own_parts = [dataclasses.replace(part, micro_batch=candidate.micro_batch_size) for part in parts]
        found = estimate(own, own_parts, exchange=exchanges[split])
        if found.fits:
            fitting.append((candidate, found))
            enough[rest] = sharing
            continue
        too_large.add((rest, sharing))
        reason, needed = reasons[_reason(candidate, found)], found.fullest.memory.total
        reason.ways, reason.least = reason.ways + 1, min(reason.least, needed)
        if closest is None or needed < closest[1].fullest.memory.total:
            closest = candidate, found
    fitting.sort(key=lambda pair: (pair[1].seconds, pair[1].fullest.memory.total))
    return Found(tried, fitting, None if fitting else closest, reasons)


def candidates(config: PlanConfig, parts: Sequence[Part]) -> Iterator[Candidate]:
    """All that divide devices, experts, heads and batch as they must; whole sequences and small micro-batches first."""
    ranks, model = config.cluster.devices, config.model
    experts = math.gcd(ranks, model.n_routed_experts) if model.has_experts else 1
    sharing = math.gcd(ranks, model.num_attention_heads, *(part.length for part in parts))
    for sp, ep in itertools.product(_divisors(sharing), _divisors(experts)):
        sequences = math.gcd(*(part.batch * sp for part in parts))
        if sequences % ranks:
            continue
        for micro, stage, mode in itertools.product(_powers(sequences // ranks), STAGES, CHECKPOINTING):
            yield Candidate(stage, ep, sp, micro, mode)


def configured(config: PlanConfig, candidate: Candidate) -> PlanConfig:
    """The run, split so."""
    parallel = dataclasses.replace(
        config.parallel,
        zero_stage=candidate.zero_stage,
        expert_parallel=candidate.expert_parallel,
        sequence_parallel=candidate.sequence_parallel,
    )
    train = dataclasses.replace(
        config.train,
        micro_batch_size=candidate.micro_batch_size,
        activation_checkpointing=candidate.activation_checkpointing,
    )
    return dataclasses.replace(config, parallel=parallel, train=train)


def _reason(candidate: Candidate, found: Estimate) -> str:
    """What takes most of the memory, at that stage and expert parallelism."""
    components = found.fullest.memory.components
    largest = max(components, key=lambda name: components[name])
    return f"ZeRO-{candidate.zero_stage}, experts over {candidate.expert_parallel}: most of it {largest}"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _powers(limit: int) -> list[int]:
    """Powers of two that divide it."""
    return [2**n for n in range(limit.bit_length()) if limit % 2**n == 0]


def headroom(found: Estimate) -> str:
    """How full a device would be, for people."""
    memory = found.fullest.memory
    return f"{as_text(memory.total)} of {as_text(memory.capacity)}"
