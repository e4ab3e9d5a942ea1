"""What a run reads, phase by phase: sequence lengths, and weights of the sources as knots of a mixture.

Samples are numbered through all phases. Phases of one sequence length that follow each other are one *stretch*: the
mixture and the epochs of its sources run through it. With another length the windows are others, so that a new stretch
begins a new epoch of each source.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

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
class StretchPlan:
    """Phases of one sequence length, one after the other."""

    first_sample: int
    samples: int
    sequence_length: int
    knots: tuple[Knot, ...]  # at samples counted from first_sample


def plan_stretches(
    phases: Sequence[DataPhase], *, sources: Sequence[str], sizes: Mapping[str, int]
) -> tuple[StretchPlan, ...]:
    """The stretches of a run.

    Args:
        phases: in order; the last one's weights hold on after its end.
        sources: names in the order of the knots' weights.
        sizes: tokens of each source, which are its weight where a phase gives none.

    Raises:
        DataError: no phase; a phase gives weights to other sources than there are.
    """
    if not phases:
        raise DataError("there are no phases: a run needs at least one, with samples to read")
    found, first, token = [], 0, 0
    for length, group in groupby(phases, key=lambda phase: phase.sequence_length):
        begin, knots = first, []
        for phase in group:
            knots += _knots(phase, first - begin, token, sources, sizes)
            first, token = first + phase.samples, token + phase.samples * length
        merged = [knot for number, knot in enumerate(knots) if not number or knot != knots[number - 1]]
        found.append(StretchPlan(begin, first - begin, length, tuple(merged)))
    return tuple(found)


def _knots(phase: DataPhase, start: int, token: int, sources: Sequence[str], sizes: Mapping[str, int]) -> list[Knot]:
    """From ``start`` on, where the run has seen ``token`` tokens; two where the weights jump."""
    weights = phase.weights if phase.weights is not None else {name: float(sizes[name]) for name in sources}
    for given in (weights, phase.final_weights or weights):
        if set(given) != set(sources):
            raise DataError(
                f"weights are given for {', '.join(sorted(given)) or 'no source'} and the data set has "
                f"{', '.join(sorted(sources))}: give one weight to each"
            )
    end = start + phase.samples
    if phase.final_weights is not None:
        final = tuple(phase.final_weights[name] for name in sources)
        return [Knot(start, tuple(_at(weights[name], token, after=True) for name in sources)), Knot(end, final)]
    last = token + phase.samples * phase.sequence_length
    turns = {at for weight in weights.values() if isinstance(weight, tuple) for at, _ in weight if token < at < last}
    knots = [Knot(start, tuple(_at(weights[name], token, after=True) for name in sources))]
    for at in sorted(turns):
        sample = start + round((at - token) / phase.sequence_length)
        for after in (False, True):
            knots.append(Knot(sample, tuple(_at(weights[name], at, after=after) for name in sources)))
    knots.append(Knot(end, tuple(_at(weights[name], last, after=False) for name in sources)))
    return knots


def _at(weight: Weight, token: float, *, after: bool) -> float:
    """A weight when the run has seen ``token`` tokens; just after or just before a jump there."""
    if not isinstance(weight, tuple):
        return float(weight)
    tokens = [at for at, _ in weight]
    right = (bisect.bisect_right if after else bisect.bisect_left)(tokens, token)
    if right == 0 or right == len(weight):
        return float(weight[min(right, len(weight) - 1)][1])
    (x0, y0), (x1, y1) = weight[right - 1], weight[right]
    return y0 + (y1 - y0) * (token - x0) / (x1 - x0)


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

    def before(self, number: int) -> list[tuple[int, int]]:
        """The pairs, as (first, one after the last), that lie before a sample of the stream."""
        return [(first, min(last + 1, number)) for first, last in self.pairs if first < number]
