import math

import numpy as np
import pytest

from k2train.experiments.statistics import interval, t_quantile


@pytest.mark.parametrize(
    ("confidence", "degrees", "t"),
    # Abramowitz and Stegun, Handbook of Mathematical Functions, table 26.10
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 30, 2.042), (0.99, 7, 3.499), (0.8, 120, 1.289)],
)
def test_quantiles_are_those_of_the_tables(confidence, degrees, t):
    assert t_quantile(confidence, degrees) == pytest.approx(t, abs=5e-4)


def test_an_interval_holds_the_true_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 4))
    held = [found.low < 3.0 < found.high for found in map(interval, draws.tolist())]
    assert np.mean(held) == pytest.approx(0.95, abs=0.01)


def test_one_value_has_no_interval():
    found = interval([2.5])
    assert (found.mean, found.number) == (2.5, 1)
    assert math.isnan(found.half)
    assert str(found) == "2.5000"
