"""Training samples by number: a pure function of the data set, the phases, the seed and the number.

Legend: B samples of a batch, T tokens of a sample.

A sample's number decides where it lies (``samples``), and with it the tokens (``windows``). World size, micro-batches
and threads never enter. Nothing here changes while a run goes on, so that resuming is asking for the next number.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from k2train.config import DataConfig, DropConfig
from k2train.data.dataset import IGNORED, Dataset, Span, TokenStream, context_starts
from k2train.data.drops import Drops
from k2train.data.phases import DataPhase, joined
from k2train.data.reader import Batch, OpenShard, read_ahead
from k2train.data.samples import Place, Samples
from k2train.data.state import check_state, make_state


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


class TrainStream:
    """Samples of a data set's training split.

    Attributes:
        samples: where each of them lies.
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
        self.samples = Samples(
            dataset,
            phases,
            seed=seed,
            packing=packing,
            group_shards=group_shards,
            max_epochs=max_epochs or {},
            skips=skips,
        )
        self.notes = self.samples.notes
        self.drops = Drops(drops, documents={name: dataset.numbered(name) for name in dataset.sources})
        self.dataset, self.seed = dataset, seed
        self.packing, self.group_shards = packing, group_shards
        self._boundaries = boundaries
        self._near = _Near(dataset, group_shards) if dataset.files.bounded else None

    @property
    def windows(self) -> int:
        """Windows of all sources at the first sequence length: samples in an epoch of a single source."""
        return self.samples.windows

    def sample(self, number: int) -> NDArray[np.int64]:
        """(T + 1,) token ids of a sample: the tokens, and the last label."""
        tokens, labels, _ = self._read([self.samples.find(number)])
        return torch.cat([tokens[0], labels[0, -1:]]).numpy()

    def batch(self, numbers: Sequence[int]) -> Batch:
        """(tokens (B, T), labels (B, T), starts (B, T)), int64, of the samples with these numbers.

        starts: the index of the first token of each token's context (``context_starts``). A document's context begins
        with the end_of_text before it; what began before the window begins at 0. None without ``boundaries``.
        """
        places = [self.samples.find(number) for number in numbers]
        length = places[0].part.sequence_length
        if any(place.part.sequence_length != length for place in places):
            raise ValueError(f"samples {numbers[0]} to {numbers[-1]} are of different lengths: ask for them apart")
        tokens, labels, starts = self._read(places)
        if self.drops.begin <= max(numbers):
            labels = self._without_dropped(labels.clone(), numbers, places)  # it may share memory with the tokens
        return tokens, labels, starts

    def _without_dropped(self, labels: torch.Tensor, numbers: Sequence[int], places: Sequence[Place]) -> torch.Tensor:
        for row, number, (part, _, window) in zip(labels.numpy(), numbers, places, strict=True):
            if (dropped := self.drops.at(number, part.name)) is not None:
                documents, lengths = part.windows.documents(window)
                left_out = np.isin(documents, dropped).repeat(lengths)
                row[: len(left_out)][left_out] = IGNORED
        return labels

    def _read(self, places: Sequence[Place]) -> Batch:
        length = places[0].part.sequence_length
        rows = torch.empty((len(places), 2, length) if self.packing else (len(places), length + 1), dtype=torch.int64)
        tokens, labels = (rows[:, 0], rows[:, 1]) if self.packing else (rows[:, :-1], rows[:, 1:])
        begins = []
        for (part, number, window), row in zip(places, rows.numpy(), strict=True):
            if self._near:
                self._near.read(part.name, part.stream, part.order.groups_from(number))
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
        place = self.samples.find(number)
        part, own_number, window = place
        tokens, labels, _ = self._read([place])
        dropped = self.drops.at(number, part.name)
        text = labels[0][labels[0] != IGNORED] if self.packing else torch.cat([tokens[0, :1], labels[0]])
        spans = tuple(part.windows.spans(window))
        gone = frozenset[int]() if dropped is None else frozenset(dropped.tolist())
        return Trace(number, part.name, own_number // part.order.windows, window, spans, gone, text.numpy())

    def tokens_seen(self, next_sample: int) -> dict[str, int]:
        """Tokens of each source in the samples before ``next_sample``."""
        return self.samples.tokens_seen(next_sample)

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


def build_stream(
    dataset: Dataset,
    config: DataConfig,
    phases: Sequence[DataPhase],
    *,
    seed: int,
    boundaries: bool,
    rewound: Sequence[Sequence[int]] = (),
) -> TrainStream:
    """The stream of a run: phases without weights of their own have those of the config.

    Args:
        dataset: of the run.
        config: of the run.
        phases: of the run.
        seed: of the run.
        boundaries: whether batches tell where documents begin.
        rewound: pairs of the first and the last sample that the run itself has left out, beside those of the config.
    """
    return TrainStream(
        dataset,
        [phase if phase.weights else replace(phase, weights=config.weights or None) for phase in phases],
        seed=seed,
        packing=config.order.packing,
        group_shards=config.order.group_shards,
        max_epochs=config.max_epochs,
        skips=joined([*config.order.skips, *rewound]) if rewound else config.order.skips,
        drops=config.order.drops,
        boundaries=boundaries,
    )
