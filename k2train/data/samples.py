"""Where each training sample lies: a number -> the source, and the window of that source.

Samples are numbered through all phases (``k2train.data.phases``). Each phase mixes its sources anew (``mixture``), and
a source goes through its windows epoch by epoch (``order``), also across phases of one sequence length.

Legend: S sources.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from k2train.data.dataset import Dataset, TokenStream
from k2train.data.errors import DataError
from k2train.data.mixture import BLOCK, Mixture
from k2train.data.order import Order
from k2train.data.phases import DataPhase, PhasePlan, Skips, plan_phases
from k2train.data.windows import Concatenated, Packed, SourceWindows, packings_of


@dataclass(frozen=True)
class Part:
    """A source, cut into windows of one length."""

    name: str
    sequence_length: int
    stream: TokenStream
    windows: SourceWindows
    order: Order


class Place(NamedTuple):
    """Where a sample lies."""

    part: Part
    number: int  # of the sample among those of its source, through all epochs
    window: int  # of the source


class _Phase:
    """Samples of one length."""

    def __init__(self, plan: PhasePlan, parts: Sequence[Part | None], begins: Sequence[int]) -> None:
        self.plan, self.parts, self._mixture = plan, parts, Mixture(plan.knots)
        self._begins = begins  # the first sample that is read here, as each source numbers its own through all epochs
        self._block = lru_cache(maxsize=4)(self._places)

    def find(self, number: int) -> Place:
        """The place of a sample of the stream."""
        block, place = divmod(number - self.plan.first_sample, BLOCK)
        return self._block(block)[place]

    def count(self, number: int) -> tuple[int, ...]:
        """(S,) samples of each source before a sample of the stream; none before the phase begins."""
        return self._mixture.counts(max(0, min(number - self.plan.first_sample, self.plan.samples)))

    def total(self) -> tuple[int, ...]:
        """(S,) samples of each source."""
        return self._mixture.counts(self.plan.samples)

    def _places(self, block: int) -> list[Place]:
        """(BLOCK,) of each sample of a block."""
        sources, turns = self._mixture.block(block)
        numbers, windows = np.empty_like(turns), np.empty_like(turns)
        for source, (part, before) in enumerate(zip(self.parts, self._mixture.quotas(block), strict=True)):
            chosen = np.flatnonzero(sources == source)
            if len(chosen):
                assert part is not None, source  # it has weight here
                numbers[chosen] = turns[chosen] + before + self._begins[source]
                windows[chosen] = part.order.positions(numbers[chosen])
        parts = (self.parts[source] for source in sources.tolist())
        return [Place(*place) for place in zip(parts, numbers.tolist(), windows.tolist(), strict=True)]


class Samples:
    """The places of all samples of a run; nothing here changes while it goes on.

    Attributes:
        plans: where each phase lies.
        skips: samples that are left out.
        notes: sentences on what the person should know: sources that begin anew.
    """

    def __init__(
        self,
        dataset: Dataset,
        phases: Sequence[DataPhase],
        *,
        seed: int,
        packing: bool,
        group_shards: int | None,
        max_epochs: Mapping[str, float],
        skips: Sequence[Sequence[int]],
    ) -> None:
        """Fixes the order; the arguments are those of ``k2train.data.TrainStream``.

        Raises:
            DataError: a source that is used is smaller than one window, or would be seen more often than allowed.
        """
        self.skips = Skips(skips)
        self._dataset, self._seed, self._packing, self._group_shards = dataset, seed, packing, group_shards
        self.notes: list[str] = []
        sizes = {name: dataset.tokens("train", name) for name in dataset.sources}
        self.plans = plan_phases(phases, left_out=self.skips.left_out(phases), sources=dataset.sources, sizes=sizes)
        self._firsts = [plan.first_sample for plan in self.plans]
        self._part = lru_cache(maxsize=None)(self._make_part)
        self._phases = list(self._assemble())
        self._check_epochs(max_epochs)

    @property
    def windows(self) -> int:
        """Windows of all sources at the first sequence length."""
        return sum(part.order.windows for part in self._phases[0].parts if part)

    def find(self, delivered: int) -> Place:
        """The place of the sample that is delivered under a number."""
        if delivered < 0:
            raise ValueError(f"sample number {delivered} is negative: samples are numbered from 0")
        number = self.skips.stream_number(delivered)
        return self._phases[bisect.bisect_right(self._firsts, number) - 1].find(number)

    def tokens_seen(self, next_sample: int) -> dict[str, int]:
        """Tokens of each source in the samples that are delivered before ``next_sample``."""
        until = self.skips.stream_number(next_sample)
        total = dict.fromkeys(self._dataset.sources, 0)
        for phase in self._phases:
            counts = np.array(phase.count(until))
            for first, last in self.skips.before(until):
                counts -= np.subtract(phase.count(last), phase.count(first))
            for name, count in zip(total, counts.tolist(), strict=True):
                total[name] += count * phase.plan.sequence_length
        return total

    def _assemble(self) -> Iterator[_Phase]:
        """The phases, each going on with the epochs of the ones before."""
        names = self._dataset.sources
        numbers, lengths = [0] * len(names), [0] * len(names)  # of each source: its next sample, and of which length
        for plan in self.plans:
            length = plan.sequence_length
            used = [any(knot.weights[source] for knot in plan.knots) for source in range(len(names))]
            parts = [self._part(source, length) if used[source] else None for source in range(len(names))]
            for source, part in enumerate(parts):
                if part is not None and lengths[source] != length:
                    if lengths[source]:
                        numbers[source] = self._begin_anew(source, part, numbers[source], lengths[source], plan)
                    lengths[source] = length
            phase = _Phase(plan, parts, tuple(numbers))
            numbers = [number + count for number, count in zip(numbers, phase.total(), strict=True)]
            yield phase

    def _begin_anew(self, source: int, part: Part, number: int, length: int, plan: PhasePlan) -> int:
        """The next sample of a source that goes on in windows of another length: the first of a new epoch."""
        epochs, more = divmod(number, self._part(source, length).order.windows)
        if more:
            name, share = self._dataset.sources[source], more / self._part(source, length).order.windows
            self.notes.append(
                f"{name}: from sample {plan.first_sample} on, of {plan.sequence_length} tokens, its epoch begins anew; "
                f"{share:.0%} of it were seen in the one before and come again"
            )
        return (epochs + bool(more)) * part.order.windows

    def _make_part(self, source: int, length: int) -> Part:
        name = self._dataset.sources[source]
        stream = self._dataset.stream("train", name)
        windows: SourceWindows
        if self._packing:
            packings = packings_of(
                stream,
                self._dataset.folder / name,
                sequence_length=length,
                group_shards=self._group_shards,
                fingerprint=self._dataset.fingerprint,
            )
            end = self._dataset.tokenizer.end_of_text
            windows = Packed(stream, packings, sequence_length=length, group_shards=self._group_shards, end_of_text=end)
        else:
            windows = Concatenated(stream, sequence_length=length, group_shards=self._group_shards)
        if not sum(windows.sizes):
            raise DataError(
                f"the training split of {name} has {len(stream)} tokens and a sample takes {length + 1} "
                f"(train.sequence_length={length} and one to predict): add text, or lower it"
            )
        # The key of a single source is that of the time when there was no other.
        key = "train" if len(self._dataset.sources) == 1 else name
        return Part(name, length, stream, windows, Order(windows.sizes, seed=self._seed, name=key))

    def _check_epochs(self, limits: Mapping[str, float]) -> None:
        for source, name in enumerate(self._dataset.sources):
            epochs = sum(
                phase.total()[source] / part.order.windows for phase in self._phases if (part := phase.parts[source])
            )
            if epochs > limits.get(name, math.inf):
                raise DataError(
                    f"the run would see the source {name} {epochs:.2f} times, and data.max_epochs.{name} allows "
                    f"{limits[name]:g}: lower its weight, shorten the run, or raise the limit"
                )
