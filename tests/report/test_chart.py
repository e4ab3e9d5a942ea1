import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2train.report.chart import (
    BOTTOM,
    BUCKETS,
    HEIGHT,
    LEFT,
    RIGHT,
    ROWS,
    TOP,
    WIDTH,
    Level,
    Series,
    heat_map,
    line_chart,
    log_ticks,
    running_mean,
    thinned,
    ticks,
)


def points(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_a_curve_lies_where_its_values_are():
    chart = line_chart("t", "u", [Series(name="a", x=[0, 5, 10], y=[0.0, 1.0, 2.0])])
    middle = ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2)
    expected = [(LEFT, HEIGHT - BOTTOM), middle, (WIDTH - RIGHT, TOP)]
    assert np.allclose(points(chart.lines[0]["path"]), expected, atol=0.06)


def test_a_logarithmic_axis_puts_the_geometric_mean_in_the_middle():
    chart = line_chart("t", "u", [Series(name="a", x=[0, 1, 2], y=[0.1, 1.0, 10.0])], log=True)
    assert points(chart.lines[0]["path"])[1][1] == pytest.approx((TOP + HEIGHT - BOTTOM) / 2, abs=0.06)


def test_what_is_not_finite_is_a_gap():
    chart = line_chart("t", "u", [Series(name="a", x=[1, 2, 3, 4], y=[1.0, 2.0, math.nan, 1.0])])
    assert re.sub(r"[\d. ]", "", chart.lines[0]["path"]) == "MLM"
    assert chart.data["series"][0]["y"] == [1.0, 2.0, None, 1.0]


def test_nothing_to_draw_is_no_chart():
    assert line_chart("t", "u", [Series(name="a", x=[1, 2], y=[math.nan, math.nan])]) is None
    assert line_chart("t", "u", []) is None
    assert heat_map("t", "u", [1], [("a", [math.nan])]) is None


def test_a_level_far_off_is_left_out():
    curves = [Series(name="a", x=[1, 2], y=[1.0, 2.0])]
    chart = line_chart("t", "u", curves, levels=[Level(name="near", y=3.0), Level(name="far", y=100.0)])
    assert [level["name"] for level in chart.levels] == ["near: 3"]


@given(st.integers(1, 5000), st.integers(0, 4999), st.sampled_from([9.0, -9.0]))
def test_a_single_spike_is_drawn_whatever_the_length(length, at, spike):
    y = [0.0] * length
    y[at % length] = spike
    x, kept = thinned(range(length), y)
    assert kept[x.index(at % length)] == spike
    assert len(x) <= 2 * BUCKETS + 2
    assert x == sorted(set(x))
    assert (x[0], x[-1]) == (0, length - 1)


def test_a_gap_of_a_long_curve_stays_one():
    y = [1.0] * 1000 + [math.nan] * 1000 + [1.0] * 1000
    assert any(math.isnan(v) for v in thinned(range(3000), y)[1])


def slow_mean(values, window):
    means = []
    for centre in range(len(values)):
        reach = min(window // 2, centre)
        near = [v for v in values[centre - reach : centre + reach + 1] if not math.isnan(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


@given(st.lists(st.one_of(st.floats(-100, 100), st.just(math.nan)), max_size=60), st.integers(1, 20))
def test_the_running_mean_is_that_of_its_neighbours(values, window):
    assert running_mean(values, window=window) == pytest.approx(slow_mean(values, window), abs=1e-9, nan_ok=True)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_inside(low, width):
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 8
    slack = 1e-6 * width
    assert all(low - slack <= tick <= low + width + slack for tick in found)


@given(st.floats(-12, 6), st.floats(1.01, 9))
def test_logarithmic_ticks_are_few_and_inside(exponent, decades):
    low, high = 10.0**exponent, 10.0 ** (exponent + decades)
    assert 1 <= len(log_ticks(low, high)) <= 6
    assert all(low <= tick <= high for tick in log_ticks(low, high))


def test_a_heat_map_keeps_the_largest_of_what_it_joins():
    rows = [(f"{n}", [0.0] * 500) for n in range(1000)]
    rows[777][1][333] = 5.0
    chart = heat_map("t", "u", range(500), rows)
    assert len(chart.tiles) <= ROWS * 50
    assert sorted(tile.shade for tile in chart.tiles)[-2:] == [0.0, 1.0]
