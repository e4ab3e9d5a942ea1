"""What goes wrong slowly is told once, and what goes well is not."""

import json
import math
import random

import pytest

from k2train.monitor import Drift
from k2train.monitor.drift import BLOCKS, Trail, records_until

STEPS = 2000


def record(step, *, loss, max_logit=10.0):
    return {"step": step, "steps": 1, "phase": "training", "loss": loss, "max_logit": max_logit}


def warnings(numbers, *, tau=100.0, steps=STEPS):
    drift = Drift(tau=tau)
    return [
        (step, warning)
        for step, (loss, logit) in enumerate(numbers, 1)
        for warning in drift.observe(record(step, loss=loss, max_logit=logit), steps=steps)
    ]


def falling(step, noise=0.05, seed=0):
    return 2.0 + 3 * (step + 10) ** -0.3 + random.Random(seed * 10**6 + step).gauss(0, noise)


def flat_after(start, step):
    return falling(min(start, step), noise=0) + random.Random(step).gauss(0, 0.05)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_that_goes_well_is_not_warned(seed):
    draw = random.Random(seed)
    assert warnings((falling(i, seed=seed), 20 * math.exp(draw.gauss(0, 0.1))) for i in range(STEPS)) == []


def test_a_loss_that_no_longer_falls_is_told_once():
    ((step, warning),) = warnings((flat_after(400, i), 10.0) for i in range(STEPS))
    assert warning["kind"] == "plateau"
    assert 400 < step < 1200


def test_the_step_at_which_logits_reach_tau_is_forecast():
    draw, rate = random.Random(0), math.log(100 / 5) / 1500  # 100 is reached at step 1,500
    growing = [(falling(i), 5 * math.exp(rate * i + draw.gauss(0, 0.03))) for i in range(STEPS)]
    step, warning = warnings(growing)[0]
    assert warning["kind"] == "max_logit"
    assert step < 500
    assert abs(warning["at"] - 1500) < 150
    assert warnings(growing, tau=None) == []  # not watched
    assert warnings(growing[:1000], steps=1000) == []  # after the end


def test_the_trail_keeps_the_mean_in_bounded_memory():
    trail = Trail()
    for value in range(1000):
        trail = trail.add(float(value))
        assert len(trail.blocks) < BLOCKS
    covered = len(trail.blocks) * trail.size
    assert sum(trail.blocks) / len(trail.blocks) == pytest.approx((covered - 1) / 2)
    assert records_until(Trail(), 5.0) is None


def test_the_state_goes_through_a_checkpoint_exactly():
    numbers = [(falling(i), 5 * math.exp(i / 500)) for i in range(600)]
    whole, first, second = Drift(tau=100.0), Drift(tau=100.0), Drift(tau=100.0)

    def told(drift, start, stop):
        parts = [record(i + 1, loss=numbers[i][0], max_logit=numbers[i][1]) for i in range(start, stop)]
        return [warning for part in parts for warning in drift.observe(part, steps=STEPS)]

    expected = told(whole, 0, 600)
    found = told(first, 0, 301)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + told(second, 301, 600) == expected
    assert expected
    assert second.state_dict() == whole.state_dict()
