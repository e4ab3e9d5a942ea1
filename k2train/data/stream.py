"""Training samples by number: a pure function of the data set, the phases, the seed and the number.

Legend: B samples of a batch, T tokens of a sample.

A sample's number decides its source (``mixture``), the window of that source (``order``), and with it the tokens
(``windows``). World size, micro-batches and threads never enter. Nothing here changes while a run goes on, so that
resuming is asking for the next number.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from k2train.config import DataConfig, DropConfig
from k2train.data.dataset import IGNORED, Dataset, Span, TokenStream, context_starts
from k2train.data.drops import Drops
from k2train.data.errors import DataError
from k2train.data.mixture import BLOCK, Mixture
from k2train.data.order import Order
from k2train.data.phases import DataPhase, PhasePlan, Skips, plan_phases
from k2train.data.reader import Batch, OpenShard, read_ahead
from k2train.data.state import check_state, make_state
from k2train.data.windows import Concatenated, Packed, SourceWindows, packings_of


@dataclass(frozen=True)
class Trace:
    """Where a sample comes from."""

    number: int  # delivered
    source: str
    epoch: int  # of the source
    window: int  # of the source
    spans: tuple[Span, ...]
    dropped: frozenset[int]  # documents, by number, of which no token is predicted
    tokens: NDArray[np.int64]  # that the spans cover, in order


@dataclass(frozen=True)
class _Part:
    """A source, cut into windows of one length."""

    stream: TokenStream
    windows: SourceWindows
    order: Order


class _Near:
    """Tells a bounded cache which groups of shards are read now and next, and lets go of those that are done."""

    def __init__(self, dataset: Dataset, group_shards: int | None) -> None:
        self._files, self._group_shards = dataset.files, group_shards
        self._groups: dict[str, tuple[int, int]] = {}
        self._streams: dict[str, TokenStream] = {}

    def read(self, name: str, stream: TokenStream, groups: tuple[int, int]) -> None:
        """Before a sample of a source is read whose group is the first of these two."""
        if self._groups.get(name) == groups:
            return
        self._groups[name], self._streams[name] = groups, stream
        pairs = self._groups.items()
        kept = [shard for source, pair in pairs for group in pair for shard in self._shards(source, group)]
        files = {shard.record.file for shard in kept}
        for each in self._streams.values():
            each.close(apart_from=files)
        self._files.keep((shard.record, shard.digests) for shard in kept)

    def _shards(self, source: str, group: int) -> Sequence[OpenShard]:
        """Of a group, and the first one after it, into which its last window may reach."""
        size = self._group_shards or len(self._streams[source].shards)
        return self._streams[source].shards[group * size : (group + 1) * size + 1]


class _Phase:
    """Samples of one length; see ``k2train.data.phases``."""

    def __init__(self, plan: PhasePlan, mixture: Mixture, parts: Sequence[_Part | None], begins: Sequence[int]) -> None:
        self.plan, self.mixture, self.parts = plan, mixture, parts
        self.begins = begins  # the first sample that is read here, as each source numbers its own through all epochs
        self.block = lru_cache(maxsize=4)(self._block)

    def find(self, number: int) -> tuple[int, int, int]:
        """Of a sample of the stream its source, its number in that source, and the window of the source."""
        block, place = divmod(number - self.plan.first_sample, BLOCK)
        sources, numbers, windows = self.block(block)
        return sources[place], numbers[place], windows[place]

    def count(self, number: int) -> tuple[int, ...]:
        """(S,) samples of each source before a sample of the stream; none before the phase begins."""
        return self.mixture.counts(max(0, min(number - self.plan.first_sample, self.plan.samples)))

    def _block(self, block: int) -> tuple[list[int], list[int], list[int]]:
        sources, turns = self.mixture.block(block)
        numbers, windows = np.empty_like(turns), np.empty_like(turns)
        for source, before in enumerate(self.mixture.quotas(block)):
            chosen = np.flatnonzero(sources == source)
            if len(chosen):
                numbers[chosen] = turns[chosen] + before + self.begins[source]
                windows[chosen] = self.part(source).order.positions(numbers[chosen])
        return sources.tolist(), numbers.tolist(), windows.tolist()

    def part(self, source: int) -> _Part:
        """A source that has weight here, and so is read."""
        part = self.parts[source]
        assert part is not None, source
        return part


_Found = tuple[_Phase, int, int, int]  # of a sample: phase, source, number in the source, and window


class TrainStream:
    """Samples of a data set's training split.

    Attributes:
        phases: as given.
        samples: that all phases deliver.
        plans: where each lies.
        notes: sentences on what the person should know: sources that begin anew.
    """

    def __init__(
        self,
        dataset: Dataset,
        phases: Sequence[DataPhase],
        *,
        seed: int,
        packing: bool = False,
        group_shards: int | None = None,
        max_epochs: Mapping[str, float] | None = None,
        skips: Sequence[Sequence[int]] = (),
        drops: Sequence[DropConfig] = (),
        boundaries: bool = True,
    ) -> None:
        """Fixes the order.

        Args:
            dataset: whose training split is read.
            phases: of the run. Samples after the last one go on as it ended.
            seed: of the order.
            packing: whole documents in windows (``k2train.data.packing``); False: cut wherever a window ends.
            group_shards: shards that are read at a time, while their windows come in mixed order; None: all.
            max_epochs: how often the tokens of a source may be seen; a source that is not named has no limit.
            skips: pairs of the first and the last sample that are left out.
            drops: documents that are predicted no more from a sample on.
            boundaries: whether batches tell where documents begin.

        Raises:
            DataError: a source that is used is smaller than one window, or would be seen more often than allowed.
        """
        self.skips, self.drops = Skips(skips), Drops(drops, sources=dataset.sources)
        self.dataset, self.phases, self.seed = dataset, tuple(phases), seed
        self.packing, self.group_shards = packing, group_shards
        self.notes: list[str] = []
        self._boundaries = boundaries
        self._near = _Near(dataset, group_shards) if dataset.files.bounded else None
        sizes = {name: dataset.tokens("train", name) for name in dataset.sources}
        self.plans = plan_phases(phases, left_out=self.skips.left_out(phases), sources=dataset.sources, sizes=sizes)
        self.samples = sum(phase.samples for phase in phases)
        self._firsts = [plan.first_sample for plan in self.plans]
        self._part = lru_cache(maxsize=None)(self._make_part)
        self._phases = list(self._assemble())
        self._check_epochs(max_epochs or {})

    @property
    def windows(self) -> int:
        """Windows of all sources at the first sequence length: samples in an epoch of a single source."""
        return sum(part.order.windows for part in self._phases[0].parts if part)

    def sample(self, number: int) -> NDArray[np.int64]:
        """(T + 1,) token ids of a sample: the tokens, and the last label."""
        tokens, labels, _ = self._read([self._find(number)])
        return torch.cat([tokens[0], labels[0, -1:]]).numpy()

    def batch(self, numbers: Sequence[int]) -> Batch:
        """(tokens (B, T), labels (B, T), starts (B, T)), int64, of the samples with these numbers.

        starts: the index of the first token of each token's context (``context_starts``). A document's context begins
        with the end_of_text before it; what began before the window begins at 0. None without ``boundaries``.
        """
        found = [self._find(number) for number in numbers]
        length = found[0][0].plan.sequence_length
        if any(phase.plan.sequence_length != length for phase, *_ in found):
            raise ValueError(f"samples {numbers[0]} to {numbers[-1]} are of different lengths: ask for them apart")
        tokens, labels, starts = self._read(found)
        if self.drops.begin <= max(numbers):
            labels = self._without_dropped(labels.clone(), numbers, found)  # it may share memory with the tokens
        return tokens, labels, starts

    def _without_dropped(self, labels: torch.Tensor, numbers: Sequence[int], found: Sequence[_Found]) -> torch.Tensor:
        for row, number, (phase, source, _, window) in zip(labels.numpy(), numbers, found, strict=True):
            if (dropped := self.drops.at(number, self.dataset.sources[source])) is not None:
                documents, lengths = phase.part(source).windows.documents(window)
                left_out = np.isin(documents, dropped).repeat(lengths)
                row[: len(left_out)][left_out] = IGNORED
        return labels

    def _read(self, found: Sequence[_Found]) -> Batch:
        length = found[0][0].plan.sequence_length
        rows = torch.empty((len(found), 2, length) if self.packing else (len(found), length + 1), dtype=torch.int64)
        tokens, labels = (rows[:, 0], rows[:, 1]) if self.packing else (rows[:, :-1], rows[:, 1:])
        begins = []
        for (phase, source, own_number, window), row in zip(found, rows.numpy(), strict=True):
            part = phase.part(source)
            if self._near:
                self._near.read(self.dataset.sources[source], part.stream, part.order.groups_from(own_number))
            part.windows.read(window, row)
            if self._boundaries:
                begins.append(part.windows.context_begins(window))
        return tokens, labels, torch.from_numpy(context_starts(begins, length)) if begins else None

    def steps(
        self, plan: Iterable[Sequence[Sequence[int]]], *, ahead: int = 1, pin: bool = False
    ) -> Generator[list[Batch]]:
        """``batch`` of each micro-batch of each step of the plan, read by one thread while the caller computes.

        Args:
            plan: sample numbers of each step's micro-batches; may be endless.
            ahead: steps that are read before they are asked for.
            pin: into page-locked memory, from which a GPU copies while it computes.
        """
        return read_ahead(self.batch, plan, ahead=ahead, pin=pin)

    def trace(self, number: int) -> Trace:
        """Source, window and documents of a sample."""
        phase, source, own_number, window = self._find(number)
        part = phase.part(source)
        epoch = own_number // part.order.windows
        tokens, labels, _ = self._read([(phase, source, own_number, window)])
        dropped = self.drops.at(number, self.dataset.sources[source])
        text = labels[0][labels[0] != IGNORED] if self.packing else torch.cat([tokens[0, :1], labels[0]])
        spans = tuple(part.windows.spans(window))
        gone = frozenset[int]() if dropped is None else frozenset(dropped.tolist())
        return Trace(number, self.dataset.sources[source], epoch, window, spans, gone, text.numpy())

    def tokens_seen(self, next_sample: int) -> dict[str, int]:
        """Tokens of each source in the samples before ``next_sample``."""
        until = self.skips.stream_number(next_sample)
        total = dict.fromkeys(self.dataset.sources, 0)
        for phase in self._phases:
            counts = np.array(phase.count(until))
            for first, last in self.skips.before(until):
                counts -= np.subtract(phase.count(last), phase.count(first))
            for name, count in zip(self.dataset.sources, counts.tolist(), strict=True):
                total[name] += count * phase.plan.sequence_length
        return total

    # ---- what a checkpoint keeps

    def state_dict(self, next_sample: int) -> dict[str, Any]:
        """All that there is to keep: equal on all ranks, a few hundred bytes as JSON."""
        return make_state(self, next_sample)

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """The next sample of a run that wrote ``state``.

        Raises:
            DataError: it read other data, or another order; the sentence names both values and the way on.
        """
        return check_state(self, state)

    # ---- how it is put together

    def _find(self, delivered: int) -> _Found:
        if delivered < 0:
            raise ValueError(f"sample number {delivered} is negative: samples are numbered from 0")
        number = self.skips.stream_number(delivered)
        phase = self._phases[bisect.bisect_right(self._firsts, number) - 1]
        return phase, *phase.find(number)

    def _assemble(self) -> Iterator[_Phase]:
        """The phases, each going on with the epochs of the ones before."""
        names = self.dataset.sources
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
            phase = _Phase(plan, Mixture(plan.knots), parts, tuple(numbers))
            counts = phase.count(plan.first_sample + plan.samples)
            numbers = [number + count for number, count in zip(numbers, counts, strict=True)]
            yield phase

    def _begin_anew(self, source: int, part: _Part, number: int, length: int, plan: PhasePlan) -> int:
        """The next sample of a source that goes on in windows of another length: the first of a new epoch."""
        epochs, more = divmod(number, self._part(source, length).order.windows)
        if more:
            name, share = self.dataset.sources[source], more / self._part(source, length).order.windows
            self.notes.append(
                f"{name}: from sample {plan.first_sample} on, of {plan.sequence_length} tokens, its epoch begins anew; "
                f"{share:.0%} of it were seen in the one before and come again"
            )
        return (epochs + bool(more)) * part.order.windows

    def _make_part(self, source: int, length: int) -> _Part:
        name = self.dataset.sources[source]
        stream = self.dataset.stream("train", name)
        windows: SourceWindows
        if self.packing:
            packings = packings_of(
                stream,
                self.dataset.folder / name,
                sequence_length=length,
                group_shards=self.group_shards,
                fingerprint=self.dataset.fingerprint,
            )
            end = self.dataset.tokenizer.end_of_text
            windows = Packed(stream, packings, sequence_length=length, group_shards=self.group_shards, end_of_text=end)
        else:
            windows = Concatenated(stream, sequence_length=length, group_shards=self.group_shards)
        if not sum(windows.sizes):
            raise DataError(
                f"the training split of {name} has {len(stream)} tokens and a sample takes {length + 1} "
                f"(train.sequence_length={length} and one to predict): add text, or lower it"
            )
        # The key of a single source is that of the time when there was no other.
        key = "train" if len(self.dataset.sources) == 1 else name
        return _Part(stream, windows, Order(windows.sizes, seed=self.seed, name=key))

    def _check_epochs(self, limits: Mapping[str, float]) -> None:
        for source, name in enumerate(self.dataset.sources):
            epochs = sum(
                phase.count(phase.plan.first_sample + phase.plan.samples)[source] / part.order.windows
                for phase in self._phases
                if (part := phase.parts[source])
            )
            if epochs > limits.get(name, math.inf):
                raise DataError(
                    f"the run would see the source {name} {epochs:.2f} times, and data.max_epochs.{name} allows "
                    f"{limits[name]:g}: lower its weight, shorten the run, or raise the limit"
                )


def build_stream(
    dataset: Dataset, config: DataConfig, phases: Sequence[DataPhase], *, seed: int, boundaries: bool
) -> TrainStream:
    """The stream of a run: phases without weights of their own have those of the config.

    Args:
        dataset: of the run.
        config: of the run.
        phases: of the run.
        seed: of the run.
        boundaries: whether batches tell where documents begin.
    """
    return TrainStream(
        dataset,
        [phase if phase.weights else replace(phase, weights=config.weights or None) for phase in phases],
        seed=seed,
        packing=config.order.packing,
        group_shards=config.order.group_shards,
        max_epochs=config.max_epochs,
        skips=config.order.skips,
        drops=config.order.drops,
        boundaries=boundaries,
    )
