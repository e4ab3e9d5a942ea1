import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2train.data.errors import DataError
from k2train.data.split import groups_of, held_out_groups


def test_a_directory_is_a_group_and_files_beside_it_are_their_own():
    assert groups_of(["a.py", "a.pyi", "b.py", "json/x.py", "json/y.py", "json/deep/z.py"]) == [
        "a",
        "a",
        "b",
        "json/",
        "json/",
        "json/deep/",
    ]


def test_the_common_folder_does_not_hold_files_together():
    assert groups_of(["only/here/a.txt", "only/here/b.txt"]) == ["only/here/a", "only/here/b"]


@given(
    st.dictionaries(st.text(min_size=1), st.integers(1, 10**6), min_size=2),
    st.floats(min_value=0.001, max_value=0.999),
)
def test_both_sides_get_something_and_the_share_is_kept(sizes, share):
    chosen = held_out_groups(sizes, share=share)
    assert 0 < len(chosen) < len(sizes)
    held_out = sum(sizes[name] for name in chosen)
    assert held_out <= max(share * sum(sizes.values()), min(sizes.values()))


def test_five_percent_of_many_groups_are_five_percent():
    rng = random.Random(0)
    sizes = {f"group{number}": rng.choice([1_000, 10_000, 100_000, 900_000]) for number in range(150)}
    held_out = sum(sizes[name] for name in held_out_groups(sizes, share=0.05))
    assert 0.0499 < held_out / sum(sizes.values()) <= 0.05


def test_the_choice_depends_on_names_and_not_on_their_order():
    names = [f"group{number}" for number in range(50)]
    chosen = held_out_groups(dict.fromkeys(names, 10), share=0.1)
    assert len(chosen) == 5
    assert held_out_groups(dict.fromkeys(reversed(names), 10), share=0.1) == chosen
    # Groups of another name and the first two characters of the order: a hash, not an alphabet.
    assert chosen != frozenset(sorted(names)[:5])


def test_one_group_cannot_be_split():
    with pytest.raises(DataError, match="at least two directories"):
        held_out_groups({"a/": 100}, share=0.05)
