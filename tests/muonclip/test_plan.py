"""Intervals of flat shards, and which parts travel when: against the elements themselves."""

import math
from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from muonclip.plan import Plan, cut

SHAPES = {"a": (6, 10), "b": (7, 3), "experts": (3, 4, 6), "q": (8, 6)}  # 60, 21, 72 and 48 elements
TOTAL = 201


def parameters(gap: int = 0):
    sizes = [math.prod(shape) + gap for shape in SHAPES.values()]
    return list(zip(SHAPES, SHAPES.values(), accumulate(sizes, initial=0), strict=False))


def plan(ranks: int, *, buffer_elements: int = 10**9, **settings) -> Plan:
    size = -(-TOTAL // ranks)
    settings = {"cost": lambda rows, columns: rows * columns, "split": {}, **settings}
    return Plan(cut(parameters(), ranks=ranks, size=size), buffer_elements=buffer_elements, **settings)


@given(st.integers(1, 12), st.integers(0, 9))
def test_every_element_lies_where_a_flat_tensor_puts_it(ranks, gap):
    entries = parameters(gap)
    size = -(-(TOTAL + gap * len(SHAPES)) // ranks)
    expected = {offset + i: (name, i) for name, shape, offset in entries for i in range(math.prod(shape))}
    found = {}
    for rank, pieces in enumerate(cut(entries, ranks=ranks, size=size)):
        for piece in pieces:
            assert piece.shape == SHAPES[piece.name]
            for i in range(piece.stop - piece.start):
                found[rank * size + piece.offset + i] = (piece.name, piece.start + i)
    assert found == expected


@given(st.integers(1, 12), st.integers(1, 300), st.booleans())
def test_every_matrix_is_local_or_travels_once_and_no_rank_holds_more_than_it_may(ranks, buffer_elements, split):
    blocks = {"a": (2, 4), "experts": (1, 3), "q": (4, 4)} if split else {}
    found = plan(ranks, buffer_elements=buffer_elements, split=blocks)
    local = [(m.name, m.number) for rank in range(ranks) for m in found.local(rank)]
    travelling = [(m.name, m.number) for matrices in found.rounds for m in matrices]
    assert Counter(local + travelling) == Counter((m.name, m.number) for m in found.matrices)
    assert sum(m.rows * m.columns for m in found.matrices) == TOTAL
    for rank, traffic in enumerate(found.traffic()):
        for matrices in found.rounds:
            concerned = [held for m in matrices if (held := under_way(m, rank))]
            assert sum(concerned) <= buffer_elements // 2 or len(concerned) == 1
            assert sum(concerned) * min(2, len(found.rounds)) <= traffic.buffers
        # There and back: what is sent on one way is received on the other.
        once = sum(under_way(m, rank) for m in found.matrices)
        assert (traffic.sent, traffic.received) == (once, once)


def under_way(matrix, rank: int) -> int:
    """Elements of a matrix that a rank sends or receives on one way, counted one by one."""
    holders = [part.rank for part in matrix.parts for _ in range(part.start, part.stop)]
    return sum((holder == rank) != (matrix.owner == rank) for holder in holders if rank in (holder, matrix.owner))


def test_loads_of_other_plans_count():
    assert max(plan(3).costs) <= 1.01 * 72
    loaded = plan(3, load=[100, 0, 0])
    assert sum(loaded.costs) == 201
    assert loaded.costs[0] == 0
    assert max(loaded.costs) <= 1.1 * 301 / 3


def test_what_is_no_matrix_is_named():
    pieces = cut([("norm", (5,), 0)], ranks=1, size=5)
    with pytest.raises(ValueError, match=r"norm has shape \[5\]: Muon takes matrices"):
        Plan(pieces, cost=lambda m, n: m * n, split={}, buffer_elements=1)
