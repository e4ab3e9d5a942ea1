import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from k2train.data.order import Order, positions


def epoch(number: int, *, windows: int, seed: int = 0, name: str = "train") -> np.ndarray:
    return positions(np.arange(number * windows, (number + 1) * windows), windows=windows, seed=seed, name=name)


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 1000, 4096, 9853])
def test_each_window_comes_once_an_epoch(windows):
    for number in (0, 1, 7):
        assert np.array_equal(np.sort(epoch(number, windows=windows)), np.arange(windows))


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_each_window_comes_once_for_any_seed(windows, seed, number):
    assert np.array_equal(np.sort(epoch(number, windows=windows, seed=seed)), np.arange(windows))


def test_epochs_seeds_and_names_are_in_unrelated_orders():
    windows = 4000
    orders = [epoch(0, windows=windows), epoch(1, windows=windows), epoch(0, windows=windows, seed=1)]
    orders.append(epoch(0, windows=windows, name="other"))
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random permutations agree in about one place, with a standard deviation of one.
            assert np.count_nonzero(one == other) <= 6
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(windows)


@pytest.mark.parametrize("windows", [1000, 4096, 9853])
def test_neighbours_are_not_related(windows):
    order = epoch(0, windows=windows).astype(float)
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / np.sqrt(windows)
    assert abs(np.corrcoef(order, np.arange(windows))[0, 1]) < 5 / np.sqrt(windows)
    gaps = np.diff(np.append(order, order[0])) % windows
    # Differences of neighbours are spread evenly: chi-square of 16 classes, 15 degrees of freedom, p about 1e-5.
    counts = np.histogram(gaps, bins=16, range=(0, windows))[0]
    assert ((counts - windows / 16) ** 2 / (windows / 16)).sum() < 50


def test_every_place_is_reached_from_everywhere():
    """Over many keys, where a sample lands is uniform: chi-square of 12 x 12 cells."""
    windows, epochs = 12, 6000
    order = positions(np.arange(windows * epochs), windows=windows, seed=3).reshape(epochs, windows)
    counts = np.stack([np.bincount(order[:, place], minlength=windows) for place in range(windows)])
    expected = epochs / windows
    # 121 degrees of freedom: mean 121, standard deviation 15.6.
    assert ((counts - expected) ** 2 / expected).sum() < 121 + 5 * 15.6


def test_the_order_never_changes():
    """Golden vectors: a change here changes what every old run would have seen."""
    assert positions(range(10), windows=10, seed=0).tolist() == GOLDEN_10
    assert positions([0, 9852, 9853, 10**9], windows=9853, seed=42).tolist() == GOLDEN_9853


def test_far_samples_and_any_batching_give_the_same():
    numbers = [5, 10**12, 3, 2**62, 5]
    together = positions(numbers, windows=1000, seed=1)
    assert together.tolist() == [int(positions([number], windows=1000, seed=1)[0]) for number in numbers]
    assert positions([], windows=1000, seed=1).shape == (0,)


def test_what_cannot_be_ordered_is_refused():
    with pytest.raises(ValueError, match="windows=0"):
        positions([0], windows=0, seed=0)
    with pytest.raises(ValueError, match="sample number -1 is negative"):
        positions([3, -1], windows=10, seed=0)


def test_it_is_what_the_document_of_the_order_says():
    """A slow oracle in Python integers, after docs/data-order.md."""

    def finalise(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def permutation(value: int, *, windows: int, seed: int, epoch: int) -> int:
        half = max(1, next(bits for bits in range(64) if 4**bits >= windows))
        while True:
            left, right = value >> half, value % 2**half
            for turn in range(8):
                key = xxhash.xxh3_64_intdigest(f"{seed}/train/{epoch}/{turn}".encode())
                left, right = right, left ^ finalise(right ^ key) % 2**half
            value = left * 2**half + right
            if value < windows:
                return value

    for windows in (1, 2, 5, 16, 17, 100):
        numbers = range(3 * windows)
        expected = [permutation(n % windows, windows=windows, seed=9, epoch=n // windows) for n in numbers]
        assert positions(numbers, windows=windows, seed=9).tolist() == expected


GOLDEN_10 = [7, 1, 3, 6, 2, 8, 9, 0, 4, 5]
GOLDEN_9853 = [7076, 9526, 9075, 3949]


@pytest.mark.parametrize("sizes", [[1], [7], [5, 1, 9, 4], [3] * 17, [0, 4, 0, 6], [1000, 3, 250]])
def test_a_two_level_order_takes_group_after_group_and_each_window_once(sizes):
    order = Order(sizes, seed=4, name="web")
    starts = np.cumsum([0, *sizes])
    for number in (0, 3):
        found = order.positions(np.arange(number * order.windows, (number + 1) * order.windows))
        assert np.array_equal(np.sort(found), np.arange(order.windows))
        groups = np.searchsorted(starts, found, side="right") - 1
        changes = np.flatnonzero(np.diff(groups)) + 1
        runs = groups[[0, *changes]]
        assert sorted(runs.tolist()) == [group for group, size in enumerate(sizes) if size]


def test_groups_come_in_another_order_each_epoch_and_are_known_ahead():
    order = Order([6] * 40, seed=4, name="web")
    epochs = order.positions(np.arange(3 * 240)).reshape(3, 40, 6) // 6
    firsts = epochs[:, :, 0]
    assert len({tuple(row) for row in firsts.tolist()}) == 3
    flat = firsts.ravel().tolist()
    for number in range(0, 2 * 240, 6):
        assert order.groups_from(number) == (flat[number // 6], flat[number // 6 + 1])


def test_one_group_is_the_plain_order_and_groups_never_change():
    numbers = np.arange(50)
    assert np.array_equal(
        Order([17], seed=3, name="train").positions(numbers), positions(numbers, windows=17, seed=3, name="train")
    )
    assert Order([4, 3, 5], seed=0, name="web").positions(np.arange(12)).tolist() == GOLDEN_GROUPS


GOLDEN_GROUPS = [4, 6, 5, 0, 1, 2, 3, 8, 10, 11, 9, 7]
