"""The rule that gives each matrix one owner."""

import subprocess
import sys
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from muonclip.ownership import assign_owners, gram_segments, newton_schulz_cost


def loads(costs, owners, ranks, load=None):
    total = list(load or [0] * ranks)
    for cost, owner in zip(costs, owners, strict=True):
        total[owner] += cost
    return total


def moved(holders, owners) -> int:
    return sum(sum(held.values()) - held.get(owner, 0) for held, owner in zip(holders, owners, strict=True))


def cut_evenly(sizes, ranks):
    """Elements by rank of matrices that lie one after the other in a flat tensor of equal shards."""
    owners_of_elements = [element * ranks // sum(sizes) for element in range(sum(sizes))]
    edges = [0, *accumulate(sizes)]
    return [dict(Counter(owners_of_elements[low:high])) for low, high in pairwise(edges)]


def test_a_matrix_stays_where_most_of_it_lies_while_loads_are_even():
    holders = [{0: 9}, {0: 5, 1: 4}, {1: 9}, {1: 2, 2: 7}, {2: 3, 3: 6}, {3: 9}]
    assert assign_owners([9, 1, 10, 9, 1, 10], holders, ranks=4) == [0, 0, 1, 2, 2, 3]


def test_matrices_move_to_a_rank_that_holds_nothing_of_them_when_only_that_evens_the_load():
    holders = [{0: 8}, {0: 8}, {0: 8}, {0: 6, 1: 2}]
    owners = assign_owners([4, 4, 4, 4], holders, ranks=4)
    assert sorted(owners) == [0, 1, 2, 3]
    assert owners[3] == 1  # it costs the fewest elements to give that one away, and rank 1 has some of it
    assert moved(holders, owners) == 8 + 8 + 6


def test_ties_go_to_the_lowest_rank():
    assert assign_owners([1, 1, 1], [{1: 2, 2: 2}, {1: 2, 2: 2}, {0: 2, 2: 2}], ranks=3) == [1, 2, 0]
    assert assign_owners([1, 1, 1], [{}, {}, {}], ranks=3) == [0, 1, 2]


@given(
    st.lists(
        st.tuples(st.integers(1, 100), st.dictionaries(st.integers(0, 4), st.integers(1, 9), max_size=5)), max_size=30
    ),
    st.none() | st.lists(st.integers(0, 200), min_size=5, max_size=5),
)
def test_no_single_move_would_even_out_the_load_any_further(matrices, load):
    costs, holders = [cost for cost, _ in matrices], [held for _, held in matrices]
    owners = assign_owners(costs, holders, ranks=5, load=load)
    assert len(owners) == len(matrices)
    assert set(owners) <= set(range(5))
    assert owners == assign_owners(list(costs), [dict(reversed(h.items())) for h in holders], ranks=5, load=load)
    found = loads(costs, owners, 5, load)
    heaviest = max(found)
    if heaviest > 1.01 * max(sum(found) / 5, max(costs, default=0)):
        rank = found.index(heaviest)
        assert all(min(found) + cost >= heaviest for cost, owner in zip(costs, owners, strict=True) if owner == rank)


@given(st.lists(st.integers(1, 40), min_size=8, max_size=60), st.integers(2, 6))
def test_the_heaviest_rank_has_at_most_a_third_more_than_anyone_could_do(costs, ranks):
    # The bound of the longest-first rule (Graham 1969), here against a lower bound of the best.
    owners = assign_owners(costs, cut_evenly(costs, ranks), ranks=ranks)
    ordered = sorted(costs, reverse=True)
    least = max(sum(costs) / ranks, ordered[0], ordered[ranks - 1] + ordered[ranks] if len(costs) > ranks else 0)
    assert max(loads(costs, owners, ranks)) <= (4 / 3) * least + 1e-9


@given(st.integers(2, 8), st.integers(20, 40))
def test_equal_matrices_in_a_flat_tensor_move_no_further_than_to_the_next_shard(ranks, each):
    costs = [7] * (ranks * each + 3)
    holders = cut_evenly(costs, ranks)
    owners = assign_owners(costs, holders, ranks=ranks)
    assert max(loads(costs, owners, ranks)) <= 7 * (each + 3)
    assert moved(holders, owners) <= sum(sum(held.values()) - max(held.values()) for held in holders) + 7 * ranks


def test_ranks_that_relieve_one_another_later_get_even_sums():
    # Pairs (0, 2) and (1, 3) will share out 20 later. Alone, the two dear ones would stay on one pair: 10 + 10.
    costs, holders = [10, 10, 1, 1], [{0: 9}, {2: 9}, {1: 9}, {3: 9}]
    assert assign_owners(costs, holders, ranks=4) == [0, 2, 1, 3]
    owners = assign_owners(costs, holders, ranks=4, relief=[0, 1, 0, 1])
    found = loads(costs, owners, 4)
    assert {found[0] + found[2], found[1] + found[3]} == {11}
    for pair in ((0, 2), (1, 3)):  # each pair has matrices of its own, and fills up what is missing
        theirs = assign_owners([1] * 20, [{0: 1}] * 10 + [{1: 1}] * 10, ranks=2, load=[found[rank] for rank in pair])
        assert max(loads([1] * 20, theirs, 2, [found[rank] for rank in pair])) == 16


def test_the_cost_counts_the_three_products_of_a_step():
    assert newton_schulz_cost(8, 3, steps=1) == 2 * 3 * 3 * 8 + 3 * 3 * 3
    assert newton_schulz_cost(3, 8, steps=5) == 5 * newton_schulz_cost(8, 3, steps=1)


def test_the_gram_form_costs_less_where_it_is_used():
    # Five steps in segments of two and three: two long products each, and 5 + 9 short ones.
    assert newton_schulz_cost(4, 12, gram=True) == 4 * 4 * 4 * 12 + 14 * 4**3
    assert newton_schulz_cost(12, 4, gram=True) == newton_schulz_cost(4, 12, gram=True) < newton_schulz_cost(4, 12)
    assert newton_schulz_cost(4, 11, gram=True) == newton_schulz_cost(4, 11)
    assert newton_schulz_cost(2, 8, steps=1, gram=True) == newton_schulz_cost(2, 8, steps=1)


def test_the_gram_form_restarts_after_two_steps_and_then_after_every_three():
    assert gram_segments(5) == [range(2), range(2, 5)]
    assert gram_segments(7) == [range(2), range(2, 5), range(5, 7)]
    assert [gram_segments(n) for n in (1, 2, 3)] == [[range(1)], [range(2)], [range(2), range(2, 3)]]


def test_neither_the_package_nor_the_planning_imports_torch():
    import muonclip

    code = "import sys, muonclip.ownership, muonclip.plan; assert 'torch' not in sys.modules"
    code += "; from muonclip import newton_schulz as f; assert callable(f)"
    path = str(Path(muonclip.__file__).parents[1])
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"], check=True)
