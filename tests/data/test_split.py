import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from k2train.data.preparation.split import fill, group_sizes
from k2train.data.sources.groups import groups_of


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


def one_by_one(totals: list[int], room: int) -> list[bool]:
    taken = []
    for size in totals:
        taken.append(size <= room)
        room -= size * taken[-1]
    return taken


@given(st.lists(st.integers(0, 10**6)), st.integers(0, 10**7))
def test_groups_are_taken_one_by_one_as_they_fit(totals, room):
    assert fill(np.array(totals, np.int64), room=room).tolist() == one_by_one(totals, room)


def test_sizes_are_summed_by_group():
    groups, sizes = group_sizes(np.array([9, 3, 9, 5], np.uint64), np.array([1, 2, 4, 8]))
    assert (groups.tolist(), sizes.tolist()) == ([3, 5, 9], [2, 8, 5])


def test_five_percent_of_many_groups_are_five_percent():
    rng = random.Random(0)
    sizes = np.array([rng.choice([1_000, 10_000, 100_000, 900_000]) for _ in range(150)])
    room = int(0.05 * sizes.sum())
    assert 0.0499 < sizes[fill(sizes, room=room)].sum() / sizes.sum() <= 0.05
