"""A run's plan: what it is, what a device holds and sends, how long it takes and what it costs, phase by phase."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from k2train.config import ConfigError, PlanConfig
from k2train.plan.communication import Traffic, traffic
from k2train.plan.count import Work, active, causal_keys, total, work
from k2train.plan.exchange import Exchange, muon_exchange
from k2train.plan.layout import Layout, Step, build_layout, step_of
from k2train.plan.memory import Memory, memory
from k2train.plan.time import Time, step_time

HOUR = 3600


@dataclass(frozen=True)
class Part:
    """Steps of one size: a phase of the run, or a part of one while its batch is ramped up."""

    name: str
    steps: int
    batch: int  # sequences a step, over all ranks
    micro_batch: int  # sequences
    length: int  # tokens of a sequence

    @property
    def tokens(self) -> int:
        """Of all its steps."""
        return self.steps * self.batch * self.length


@dataclass(frozen=True)
class PhaseEstimate:
    """What a part of the run takes."""

    part: Part
    step: Step
    work: Work  # of a token
    memory: Memory
    traffic: Sequence[Traffic]
    time: Time

    @property
    def seconds(self) -> float:
        """Of all its steps."""
        return self.part.steps * self.time.step


@dataclass(frozen=True)
class Estimate:
    """What a run takes."""

    layout: Layout
    exchange: Exchange
    phases: Sequence[PhaseEstimate]

    @property
    def parameters(self) -> int:
        """In all."""
        return total(self.layout.found)

    @property
    def active(self) -> int:
        """Used for a token."""
        return active(self.layout.found, self.layout.config.model)

    @property
    def tokens(self) -> int:
        """Of the run."""
        return sum(phase.part.tokens for phase in self.phases)

    @property
    def data_bytes(self) -> int:
        """Of shards with a token for each that is trained on: two bytes each, or four (docs/data-format.md)."""
        size = self.layout.config.model.vocab_size
        assert size is not None
        return self.tokens * (2 if size <= 2**16 else 4)

    @property
    def flops(self) -> float:
        """Of the run, of the model alone."""
        return sum(phase.part.tokens * phase.work.training for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Of the run."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def device_hours(self) -> float:
        """Of all devices together."""
        return self.seconds * self.layout.ranks / HOUR

    @property
    def dollars(self) -> float | None:
        """None where no price is given."""
        price = self.layout.config.cluster.dollars_per_hour
        return None if price is None else price * self.device_hours

    @property
    def utilisation(self) -> float:
        """Of the peak, over the whole run."""
        return self.flops / (self.seconds * self.layout.ranks * self.phases[0].time.peak)

    @property
    def fullest(self) -> PhaseEstimate:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.memory.total)

    @property
    def fits(self) -> bool:
        """Whether every phase fits into the memory of a device."""
        return self.fullest.memory.fits


def estimate(config: PlanConfig, parts: Sequence[Part], *, exchange: Exchange | None = None) -> Estimate:
    """The plan of a run.

    Args:
        config: of the run, and its cluster; ``model.vocab_size`` is a number.
        parts: what its steps are.
        exchange: of Muon, if it is known; None: it is planned.

    Raises:
        ConfigError: the run cannot be split so, a sentence for each reason.
    """
    if faults := list(refusals(config, parts)):
        raise ConfigError(faults)
    layout = build_layout(config)
    exchange, phases = exchange or muon_exchange(layout), []
    for part in parts:
        step = step_of(layout, batch=part.batch, micro_batch=part.micro_batch, length=part.length)
        found = traffic(layout, step, exchange)
        cost = work(config.model, keys=causal_keys(part.length))
        phases.append(
            PhaseEstimate(
                part,
                step,
                cost,
                memory(layout, step, exchange),
                found,
                step_time(layout, step, found, exchange),
            )
        )
    return Estimate(layout, exchange, phases)


def refusals(config: PlanConfig, parts: Sequence[Part]) -> Iterator[str]:
    """Why a run cannot be split as its config says, a sentence each."""
    ranks, ep, sp = config.cluster.devices, config.parallel.expert_parallel, config.parallel.sequence_parallel
    if ranks % ep:
        yield f"parallel.expert_parallel={ep} does not divide the {ranks} devices of the cluster"
    if ranks % sp:
        yield f"parallel.sequence_parallel={sp} does not divide the {ranks} devices of the cluster"
        return
    for part in parts:
        if part.batch * sp % (ranks * part.micro_batch):
            every = ranks * part.micro_batch // math.gcd(sp, ranks * part.micro_batch)
            yield (
                f"{part.name}: a step of {part.batch} sequences does not divide over {ranks} devices in micro-batches "
                f"of {part.micro_batch}: it must be a multiple of {every}"
            )


def with_vocabulary(config: PlanConfig) -> PlanConfig:
    """The config with a number as its vocabulary: where that follows the tokenizer, the size that this will have.

    Raises:
        ConfigError: only the tokenizer's file, or the data, would tell.
    """
    tokenizer = config.data.tokenizer
    if config.model.vocab_size is not None:
        return config
    if config.data.prepared or tokenizer.kind not in ("bpe", "bytes"):
        raise ConfigError(
            [
                "model.vocab_size=null follows the tokenizer, whose size is not known without its file: "
                "give it, as in model.vocab_size=163840"
            ]
        )
    size = 257 if tokenizer.kind == "bytes" else tokenizer.vocab_size
    assert size is not None
    padded = -(-size // tokenizer.pad_to_multiple) * tokenizer.pad_to_multiple
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=padded))
