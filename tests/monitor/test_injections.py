"""Faults in real training are told as soon as they can be."""

import pytest

from tests.monitor.injections import FAULTS, RATES, measure


@pytest.mark.full
def test_faults_are_told_in_time(tmp_path):
    outcomes, smooth, alarms = measure(1, tmp_path)
    lags = {outcome.fault: outcome.lag for outcome in outcomes}
    assert {fault: lags[fault] for fault in FAULTS} == dict.fromkeys(FAULTS, 0)
    assert all(lags[rate] is not None for rate in RATES)
    assert alarms <= max(1, smooth / 5000)
