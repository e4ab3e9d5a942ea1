"""The rule that gives each matrix one owner."""

import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from muonclip.ownership import assign_owners, gram_segments, newton_schulz_cost


def test_what_lies_on_one_rank_stays_and_the_rest_evens_out_the_load():
    holders = [[0], [1], [0, 1], [0, 1], [0, 1]]
    # Rank 0 starts with 10, rank 1 with 1: there go 6 and 4, and the 3 to rank 0, which is then the lighter one.
    assert assign_owners([10, 1, 4, 6, 3], holders, ranks=2) == [0, 1, 1, 1, 0]


def test_ties_go_to_the_lowest_rank():
    assert assign_owners([1, 1, 1], [[1, 2], [1, 2], [0, 2]], ranks=3) == [1, 2, 0]


@given(st.lists(st.tuples(st.integers(1, 100), st.sets(st.integers(0, 4), min_size=1)), max_size=30))
def test_every_matrix_has_one_owner_that_holds_a_part_of_it(matrices):
    costs, holders = [cost for cost, _ in matrices], [sorted(held) for _, held in matrices]
    owners = assign_owners(costs, holders, ranks=5)
    assert len(owners) == len(matrices)
    assert all(owner in held for owner, held in zip(owners, holders, strict=True))
    assert owners == assign_owners(costs, holders, ranks=5)


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


def test_neither_the_package_nor_this_module_imports_torch():
    import muonclip

    code = "import sys, muonclip.ownership; assert 'torch' not in sys.modules; from muonclip import newton_schulz as f"
    code += "; assert callable(f)"
    path = str(Path(muonclip.__file__).parents[1])
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"], check=True)
