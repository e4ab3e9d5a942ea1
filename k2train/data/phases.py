"""What a run reads, phase by phase: sequence lengths, and the shares of the sources as knots of a mixture.

Samples are numbered through all phases, and tokens are counted with those of samples that are left out. Each phase has
a mixture of its own, which is made as if the phase went on for ever: when it ends, what was read does not depend on it.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from k2train.data.errors import DataError
from k2train.data.mixture import Knot

Weight = float | tuple[tuple[float, float], ...]  # constant, or pairs (training tokens, weight), linear in between


@dataclass(frozen=True)
class DataPhase:
    """A part of a run in which samples are of one length."""

    samples: int
    sequence_length: int
    weights: Mapping[str, Weight] | None = None  # of each source; None: as many tokens as it has
    final_weights: Mapping[str, float] | None = None  # at the end of the phase, reached linearly from ``weights``


@dataclass(frozen=True)
class PhasePlan:
    """Where a phase lies in the run, and how its sources are mixed."""

    first_sample: int
    samples: int
    sequence_length: int
    knots: tuple[Knot, ...]  # at samples counted from first_sample


def plan_phases(
    phases: Sequence[DataPhase], *, left_out: Sequence[int], sources: Sequence[str], sizes: Mapping[str, int]
) -> tuple[PhasePlan, ...]:
    """The phases of a run.

    Args:
        phases: in order; the last one goes on for ever.
        left_out: samples that each phase has beyond those that it delivers.
        sources: names in the order of the knots' weights.
        sizes: tokens of each source, which are its weight where a phase gives none.

    Raises:
        DataError: no phase; a phase gives weights to other sources than there are.
    """
    if not phases:
        raise DataError("there are no phases: a run needs at least one, with samples to read")
    found, first, token = [], 0, 0
    for phase, more in zip(phases, left_out, strict=True):
        samples, length = phase.samples + more, phase.sequence_length
        lines = _lines(phase, token, sources, sizes)
        later = [Knot(round((at - token) / length), shares) for at, shares in lines if at > token]
        found.append(PhasePlan(first, samples, length, (Knot(0, _along(lines, token)), *later)))
        first, token = first + samples, token + samples * length
    return tuple(found)


Shares = tuple[float, ...]


def _lines(
    phase: DataPhase, token: int, sources: Sequence[str], sizes: Mapping[str, int]
) -> list[tuple[float, Shares]]:
    """The shares of the sources at the training tokens where a weight turns: linear in between, two there at a jump."""
    weights = phase.weights if phase.weights is not None else {name: float(sizes[name]) for name in sources}
    for given in (weights, phase.final_weights or weights):
        if set(given) != set(sources):
            raise DataError(
                f"weights are given for {', '.join(sorted(given)) or 'no source'} and the data set has "
                f"{', '.join(sorted(sources))}: give one weight to each"
            )
    if phase.final_weights is not None:
        end = token + phase.samples * phase.sequence_length
        start = [_at(weights[name], token, after=True) for name in sources]
        return [(token, _shares(start)), (end, _shares([phase.final_weights[name] for name in sources]))]
    turns = sorted({at for weight in weights.values() if isinstance(weight, tuple) for at, _ in weight})
    return [
        (at, _shares([_at(weights[name], at, after=after) for name in sources]))
        for at in turns or [0.0]
        for after in (False, True)
    ]


def _along(lines: Sequence[tuple[float, Shares]], token: float) -> Shares:
    """The shares when the run has seen ``token`` tokens; after a jump if there is one."""
    each = [tuple((at, shares[source]) for at, shares in lines) for source in range(len(lines[0][1]))]
    return tuple(_at(line, token, after=True) for line in each)


def _at(weight: Weight, token: float, *, after: bool) -> float:
    if not isinstance(weight, tuple):
        return float(weight)
    tokens = [at for at, _ in weight]
    right = (bisect.bisect_right if after else bisect.bisect_left)(tokens, token)
    if right == 0 or right == len(weight):
        return float(weight[min(right, len(weight) - 1)][1])
    (x0, y0), (x1, y1) = weight[right - 1], weight[right]
    return y0 + (y1 - y0) * (token - x0) / (x1 - x0)


def _shares(weights: Sequence[float]) -> Shares:
    total = sum(weights)
    if min(weights) < 0 or not 0 < total < float("inf"):
        raise DataError(f"the weights {list(weights)} must be at least 0, and one of them above: weigh some source")
    return tuple(weight / total for weight in weights)


def joined(pairs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Pairs of a first and a last sample in rising order, those that overlap made one."""
    found: list[list[int]] = []
    for first, last in sorted(map(tuple, pairs)):
        if found and first <= found[-1][1]:
            found[-1][1] = max(found[-1][1], last)
        else:
            found.append([first, last])
    return found


class Skips:
    """Samples that a run leaves out, as [first, last] pairs: written down with the run, never an edit of its past.

    What is *delivered* is numbered without gaps; the sample of the stream behind it is found here.
    """

    def __init__(self, skips: Sequence[Sequence[int]]) -> None:
        """Takes pairs of the first and the last sample left out, rising and apart.

        Raises:
            DataError: pairs that overlap, or are not in order.
        """
        flat = [number for pair in skips for number in pair]
        if any(len(pair) != 2 or pair[0] > pair[1] for pair in skips) or any(
            after[0] <= before[1] for before, after in pairwise(skips)
        ):
            raise DataError(f"skips {[list(pair) for pair in skips]} must be pairs [first, last] in rising order")
        assert min(flat, default=0) >= 0, flat
        self.pairs = [(first, last) for first, last in skips]
        self._delivered: list[int] = []  # the delivered number of the first sample after each pair
        left_out = 0
        for first, last in self.pairs:
            self._delivered.append(first - left_out)
            left_out += last - first + 1
        self._left_out = [0]
        for first, last in self.pairs:
            self._left_out.append(self._left_out[-1] + last - first + 1)

    def stream_number(self, delivered: int) -> int:
        """The sample of the stream that is delivered under a number."""
        return delivered + self._left_out[bisect.bisect_right(self._delivered, delivered)]

    def passed(self, delivered: int) -> int:
        """Samples of the stream up to the last of so many delivered; what is left out right after it is yet to come."""
        return self.stream_number(delivered - 1) + 1 if delivered else 0

    def left_out(self, phases: Sequence[DataPhase]) -> list[int]:
        """How many samples each phase leaves out, and so has beyond those that it delivers."""
        found, first = [], 0
        for phase in phases:
            more = 0
            for begin, last in self.pairs:
                if first <= begin < first + phase.samples + more:
                    more += last - begin + 1
            found.append(more)
            first += phase.samples + more
        return found

    def before(self, number: int) -> list[tuple[int, int]]:
        """The pairs, as (first, one after the last), that lie before a sample of the stream."""
        return [(first, min(last + 1, number)) for first, last in self.pairs if first < number]
