"""Which source each sample comes from: whole quotas that follow shares which may change over training.

Weights are given at knots; at each knot they are divided by their sum, and a source's *share* is linear in between.
The integral of its share from 0 to n is what a source is *due* of the first n samples. Quotas follow it in closed form:
any sample is found without those before it.

The sources are the leaves of a binary tree. Of the first q samples of a node its left child has f(q): what the child
was due, rounded, when the node was due q. A child is never due more than its node: f grows by 0 or 1, counts never run
backwards, and those of two children add up to their node's. A split is off by half a sample and hands down the child's
share of its node's error: 1/2 + r e. In a balanced tree that is at most d / 2 samples at depth d, which is one for up
to four sources. In Huffman's tree of weights w that stay, the nodes above a leaf have at least 1, 2, 3, 5, 8, ... times
its weight (two neighbours are each no smaller than the lesser child of the node beside), so that no source is off by
more than (1 + 1 + 1/2 + 1/3 + 1/5 + ...) / 2 < 1.7 samples, whatever their number. The better of the two is taken. At
the end of each block of ``BLOCK`` samples, the sources that have samples to spare on both sides of it are rounded once
more, each to one of the two whole numbers beside what it is due: where all have, none is off by one. Inside a block,
the samples of a source are spread as what it is due rises.

Source: Huffman 1952, "A method for the construction of minimum-redundancy codes". Whether counts in closed form that
never run backwards could all stay within one sample, for any number of sources however rare, we do not know; ``bound``
says what these do.

Counting is in Python's integers, without rounding. Legend: K knots, S sources.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096
ONE = 1 << 32  # a share of 1; shares are rounded to whole parts of it
FINE = 1 << 40  # a sample, in the arithmetic inside a block
UNIT = 2 * ONE  # in which the integral of a share is counted, as the mean of two shares is half of a sum


@dataclass(frozen=True)
class Knot:
    """Weights of all sources from a sample on; two knots at one sample make a jump."""

    sample: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class _Node:
    sources: tuple[int, ...]
    children: tuple[_Node, _Node] | None


class Mixture:
    """The source of each sample; holds nothing that changes but what it has worked out before."""

    def __init__(self, knots: Sequence[Knot]) -> None:
        """Fixes the order.

        Args:
            knots: (K,) in the order of their samples, the first at sample 0. The last weights stay for ever.

        Raises:
            ValueError: knots out of order; weights that are negative, or all zero.
        """
        _check(knots)
        self.sources = len(knots[0].weights)
        self._starts = [knot.sample for knot in knots]
        self._shares = [_shares(knot.weights) for knot in knots]
        due = (0,) * self.sources  # in UNITs
        self._due_at = [due]
        for start, stop, before, after in zip(
            self._starts, self._starts[1:], self._shares, self._shares[1:], strict=False
        ):
            due = tuple(d + (a + b) * (stop - start) for d, a, b in zip(due, before, after, strict=True))
            self._due_at.append(due)
        far = 2 * self._starts[-1] + BLOCK
        weights = [Fraction(*self.due(far, [source])) for source in range(self.sources)]
        trees = [_huffman(weights), _balanced(sorted(range(self.sources), key=weights.__getitem__))]
        # By how much a source's count may be off, in samples.
        self.bound, self._tree = min(((self._bound(tree), tree) for tree in trees), key=lambda pair: pair[0])
        self.quotas = lru_cache(maxsize=256)(self._quotas)
        self.block = lru_cache(maxsize=8)(self._block)

    def due(self, number: int, sources: Sequence[int]) -> tuple[int, int]:
        """What these sources are due together of the first ``number`` samples, as numerator and denominator."""
        return self._due(bisect.bisect_right(self._starts, number) - 1, number, sources)

    def counts(self, number: int) -> tuple[int, ...]:
        """(S,) how many of the first ``number`` samples come from each source."""
        block, place = divmod(number, BLOCK)
        quotas = self.quotas(block)
        if not place:
            return quotas
        inside = np.bincount(self.block(block)[0][:place], minlength=self.sources)
        return tuple(quota + int(more) for quota, more in zip(quotas, inside, strict=True))

    def find(self, number: int) -> tuple[int, int]:
        """The source of sample ``number``, and how many samples of that source there are before it."""
        block, place = divmod(number, BLOCK)
        sources, turns = self.block(block)
        source = int(sources[place])
        return source, self.quotas(block)[source] + int(turns[place])

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(BLOCK,) the source of each sample of the block, and how many of that source the block has before it."""
        counts = np.subtract(self.quotas(block + 1), self.quotas(block))
        sources = np.repeat(np.arange(self.sources), counts)
        turns = np.concatenate([np.arange(count) for count in counts])
        times = [_spread(rise, int(count)) for rise, count in zip(self._rises(block * BLOCK), counts, strict=True)]
        order = np.argsort(np.concatenate(times), kind="stable")
        return sources[order], turns[order]

    def _rises(self, first: int) -> NDArray[np.int64]:
        """(S, BLOCK + 1) what each source is due from sample ``first`` to each of the block's, in parts of FINE."""
        result = np.zeros((self.sources, BLOCK + 1), dtype=np.int64)
        start = first
        while start < first + BLOCK:
            segment = bisect.bisect_right(self._starts, start) - 1
            last = segment + 1 == len(self._starts)
            stop = first + BLOCK if last else min(first + BLOCK, self._starts[segment + 1])
            length = 1 if last else self._starts[segment + 1] - self._starts[segment]
            steps = np.arange(1, stop - start + 1)
            place = start - first
            for source, share in enumerate(self._shares[segment]):
                slope = 0 if last else self._shares[segment + 1][source] - share
                linear = (share * length + slope * (start - self._starts[segment])) * FINE // (ONE * length)
                square = slope * FINE // (UNIT * length)
                rise = result[source, place] + steps * (linear + square * steps)
                result[source, place + 1 : place + 1 + len(steps)] = rise
            start = stop
        return result

    def _quotas(self, block: int) -> tuple[int, ...]:
        """(S,) how many samples of each source there are before a block."""
        number = block * BLOCK
        counts = dict(self._descend(self._tree, number))
        plenty = [source for source in range(self.sources) if self._has_plenty(source, number)]
        due = {source: self.due(number, [source]) for source in plenty}
        lower = {source: above // below for source, (above, below) in due.items()}
        rest = {source: (above % below) / below for source, (above, below) in due.items()}
        upward = sum(counts[source] for source in plenty) - sum(lower.values())
        broken = sorted((source for source in plenty if rest[source]), key=lambda source: (-rest[source], source))
        if 0 <= upward <= len(broken):
            counts |= lower
            for source in broken[:upward]:
                counts[source] += 1
        return tuple(counts[source] for source in range(self.sources))

    def _has_plenty(self, source: int, number: int) -> bool:
        """Whether the source is due so much in the blocks on both sides that no rounding there could run backwards."""
        if not number:
            return False
        edges = [self.due(number + step, [source]) for step in (-BLOCK, 0, BLOCK)]
        return all(b[0] / b[1] - a[0] / a[1] > 1 + self.bound for a, b in pairwise(edges))

    def _bound(self, node: _Node, above: float = 0.0) -> float:
        """By how much a leaf below the node may be off, where the node is off by ``above``."""
        if node.children is None:
            return above
        found = []
        for child in node.children:
            shares = ([sum(at[i] for i in each.sources) for each in (child, node)] for at in self._shares)
            # Between two knots the share of the node's is between what it is at these.
            share = max((part / whole for part, whole in shares if whole), default=0.0)
            found.append(self._bound(child, 0.5 + share * above))
        return max(found)

    def _descend(self, node: _Node, count: int) -> Iterator[tuple[int, int]]:
        """(source, count) of each leaf below a node that has ``count`` samples."""
        if node.children is None:
            yield node.sources[0], count
            return
        left, right = node.children
        of_left = self._split(node, count)
        yield from self._descend(left, of_left)
        yield from self._descend(right, count - of_left)

    def _split(self, node: _Node, count: int) -> int:
        """How many of the first ``count`` samples of a node go to its left child."""
        assert node.children is not None
        if not count:
            return 0
        left = node.children[0].sources
        segment = self._segment_of(node.sources, count)
        at = self._due_at[segment]
        node_due, left_due = sum(at[i] for i in node.sources), sum(at[i] for i in left)
        node_share = sum(self._shares[segment][i] for i in node.sources)
        last = segment == len(self._starts) - 1
        if last and not node_share:  # it is never due so much: as on the whole until here
            return _rounded(left_due * count, node_due) if node_due else 0
        if last or self._shares[segment] == self._shares[segment + 1]:
            left_share = sum(self._shares[segment][i] for i in left)
            return _rounded(left_due * node_share + (count * UNIT - node_due) * left_share, node_share * UNIT)
        start, stop = self._starts[segment], self._starts[segment + 1]
        steps = range(start, stop)
        reached = bisect.bisect_left(steps, True, key=lambda n: self._reaches(segment, n + 1, node.sources, count))
        before, after = steps[reached], steps[reached] + 1
        # Between two samples, what is due grows evenly.
        (node_a, below), (node_b, _) = (self._due(segment, n, node.sources) for n in (before, after))
        (left_a, _), (left_b, _) = (self._due(segment, n, left) for n in (before, after))
        across = node_b - node_a
        if not across:
            return _rounded(left_a, below)
        return _rounded(left_a * across + (count * below - node_a) * (left_b - left_a), across * below)

    def _segment_of(self, sources: Sequence[int], count: int) -> int:
        """The segment, from one knot to the next, in which the sources are due ``count`` together."""
        reached = [sum(due[i] for i in sources) >= count * UNIT for due in self._due_at[1:]]
        return bisect.bisect_left(reached, True)

    def _reaches(self, segment: int, number: int, sources: Sequence[int], count: int) -> bool:
        above, below = self._due(segment, number, sources)
        return above >= count * below

    def _due(self, segment: int, number: int, sources: Sequence[int]) -> tuple[int, int]:
        steps = number - self._starts[segment]
        at, shares = self._due_at[segment], self._shares[segment]
        above = sum(at[i] + UNIT // ONE * shares[i] * steps for i in sources)
        if segment + 1 == len(self._starts):
            return above, UNIT
        length = self._starts[segment + 1] - self._starts[segment]
        slope = sum(self._shares[segment + 1][i] - shares[i] for i in sources)
        return above * length + slope * steps * steps, UNIT * length


def _spread(rise: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """(count,) where in a block the samples of a source lie, as what it is due there has risen: in parts of FINE."""
    middles = 2 * np.arange(count) + 1  # of 2 * count parts of the block
    if not rise[-1]:  # nothing is due, but what was rounded
        even: NDArray[np.int64] = middles * (BLOCK * FINE // (2 * count or 1))
        return even
    wanted = middles * (rise[-1] // (2 * count or 1))
    after = np.searchsorted(rise, wanted, side="right").clip(1, BLOCK)
    below = rise[after - 1]
    between = (wanted - below) * (FINE >> 20) // np.maximum((rise[after] - below) >> 20, 1)
    result: NDArray[np.int64] = (after - 1) * FINE + between.clip(0, FINE - 1)
    return result


def _rounded(above: int, below: int) -> int:
    return (2 * above + below) // (2 * below)


def _balanced(sources: Sequence[int]) -> _Node:
    """A tree in which neighbours share nodes."""
    if len(sources) == 1:
        return _Node((sources[0],), None)
    middle = len(sources) // 2
    return _joined(_balanced(sources[:middle]), _balanced(sources[middle:]))


def _huffman(weights: Sequence[Fraction]) -> _Node:
    """The two lightest nodes are joined until there is one; of equals those that are older."""
    nodes = [(weight, age, _Node((age,), None)) for age, weight in enumerate(weights)]
    heapq.heapify(nodes)
    for age in range(len(nodes), 2 * len(nodes) - 1):
        one, other = heapq.heappop(nodes), heapq.heappop(nodes)
        heapq.heappush(nodes, (one[0] + other[0], age, _joined(one[2], other[2])))
    return nodes[0][2]


def _joined(left: _Node, right: _Node) -> _Node:
    return _Node(left.sources + right.sources, (left, right))


def _shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as parts of ``ONE`` that add up to it; what is left of rounding down goes to the largest."""
    exact = [int(weight * (1 << 52) / max(weights)) for weight in weights]
    shares = [part * ONE // sum(exact) for part in exact]
    shares[exact.index(max(exact))] += ONE - sum(shares)
    return tuple(shares)


def _check(knots: Sequence[Knot]) -> None:
    samples = [knot.sample for knot in knots]
    if not samples or samples[0] != 0 or samples != sorted(samples):
        raise ValueError(f"the weights' samples {samples} must begin with 0 and never fall")
    for knot in knots:
        if min(knot.weights) < 0 or not 0 < sum(knot.weights) < float("inf"):
            raise ValueError(
                f"the sources' weights {list(knot.weights)} from sample {knot.sample} on must be at least 0, "
                "and one of them above: weigh at least one source"
            )
