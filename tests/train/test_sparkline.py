import math

import pytest

from k2train.train.sparkline import BLOCKS, KEPT, Sparkline


def drawn(values, width):
    line = Sparkline()
    for value in values:
        line.add(value)
    return line.draw(width)


def test_it_goes_from_the_lowest_to_the_highest_block():
    assert drawn(range(8), 8) == "▁▂▃▅▆▇██"
    assert drawn([1.0, 1.0], 8) == "▁▁"


@pytest.mark.parametrize("number", [0, 1, 7, 100, KEPT - 1, KEPT, KEPT + 1, 10 * KEPT + 3])
def test_it_fits_and_shows_the_newest(number):
    line = drawn(range(number), 60)
    assert len(line) == min(number, 60)
    assert list(line) == sorted(line, key=BLOCKS.index)


def test_memory_is_bounded_and_a_fall_late_in_a_long_run_shows():
    line = Sparkline()
    for step in range(100_000):
        line.add(1.0 if step < 90_000 else 0.0)
    assert len(line._means) < KEPT
    assert line.draw(10) == "█████████▁"


def test_a_high_beginning_does_not_flatten_the_rest():
    assert drawn([1000.0, *range(19, 0, -1)], 20).count("▁") <= 2


def test_what_is_not_finite_is_passed_over():
    assert drawn([math.nan, None, math.inf, 1.0, 2.0], 8) == drawn([1.0, 2.0], 8)
