"""Faults in real training are told as soon as they can be."""

import pytest

from tests.monitor.injections import measure


@pytest.mark.full
def test_faults_are_told_in_time(tmp_path):
    outcomes, smooth, alarms = measure(1, tmp_path)
    lags = {outcome.fault: outcome.lag for outcome in outcomes}
    at_once = ("random_tokens", "one_token", "shuffled_tokens", "half_batch", "gradient_x1000", "gradient_nan")
    assert {fault: lags[fault] for fault in (*at_once, "loss_inf")} == dict.fromkeys((*at_once, "loss_inf"), 0)
    assert lags["lr_x30"] is not None
    assert alarms <= max(1, smooth / 5000)
