"""What goes wrong slowly is told once, and what goes well is not."""

import json
import math
import random
from pathlib import Path

import pytest

from k2train.monitor import Drift
from k2train.monitor.drift import BLOCKS, Trail, records_until

STEPS = 2000


def record(step, *, loss, max_logit=10.0):
    lr = min(1.0, step / 20)  # warm-up
    return {"step": step, "steps": 1, "phase": "training", "lr": lr, "loss": loss, "max_logit": max_logit}


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
    assert step <= 800
    assert abs(warning["at"] - 1500) < 150
    assert warnings(growing, tau=None) == []  # not watched
    assert warnings(growing[:1000], steps=1000) == []  # after the end


def logit_warnings(logits, *, steps=STEPS):
    return warnings(((falling(step), logit) for step, logit in enumerate(logits)), steps=steps)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(
    "shape",
    {
        "levels off": lambda i: 45 * (1 - math.exp(-i / 150)),
        "as a root": lambda i: 1.6 * math.sqrt(i),
        "a jump": lambda i: 10 if i < 300 else 60,
        "as a logarithm": lambda i: 10 * math.log(i),
        "up and down": lambda i: 40 + 20 * math.sin(i / 15),
    }.values(),
)
def test_a_rise_that_does_not_go_on_is_not_drawn_out(shape, noise):
    draw = random.Random(1)
    assert logit_warnings(max(shape(i) * math.exp(draw.gauss(0, noise)), 0.1) for i in range(1, STEPS)) == []


def test_a_straight_rise_is_forecast():
    draw = random.Random(2)
    ((_, warning),) = logit_warnings(10 + i * 90 / 1200 + draw.gauss(0, 1) for i in range(STEPS))
    assert abs(warning["at"] - 1200) < 120


def test_the_default_run_is_not_told_that_it_reaches_tau():
    """Recorded: its logits rise fast at first, to 46 at the end; a forecast of 100 at step 90 was wrong."""
    recorded = json.loads((Path(__file__).parent / "default_run.json").read_text())
    assert len(recorded) == 280
    assert 40 < max(logit for _, logit in recorded) < 50
    drift = Drift(tau=100.0)
    for step, (lr, logit) in enumerate(recorded, 1):
        assert drift.observe(record(step, loss=falling(step), max_logit=logit) | {"lr": lr}, steps=280) == []


def test_experts_that_get_no_tokens_are_named_once():
    drift, told = Drift(tau=None), []
    for step in range(1, 40):
        loads = {
            "layers.1": [1.0, 1.9, 0.05 if step > 10 else 1.1, 1.0],
            "layers.2": [1.0, 0.01 * (step % 3 * 100), 1.0],
        }
        told += [
            (step, w) for w in drift.observe(record(step, loss=falling(step)) | {"expert_load": loads}, steps=STEPS)
        ]
    ((step, warning),) = told
    assert step == 18
    assert "layers.1 expert 2 got" in warning["sentence"]
    assert "layers.2" not in warning["sentence"]


def test_a_source_whose_loss_rises_while_others_fall_is_named_once():
    drift, told = Drift(tau=None), []
    for step in range(100, 1500, 100):
        web, code = 3 - step / 1000, 2.0 if step < 500 else 2.0 + (step - 500) / 5000
        losses = {"web": web, "code": code, "noisy": 2.5 + 0.1 * (step // 100 % 2)}
        sets = {name: {"loss": loss} for name, loss in losses.items()}
        told += [(step, w) for w in drift.observe_validation({"step": step, "sets": sets, "whole": False})]
    ((step, warning),) = told
    assert (step, warning["kind"]) == (900, "source code")
    assert drift.observe_validation({"step": 1500, "sets": {"web": {"loss": 9.0}}, "whole": True}) == []


def test_the_trail_keeps_the_mean_in_bounded_memory():
    trail = Trail()
    for value in range(1000):
        trail = trail.add(float(value))
        assert len(trail.blocks) < BLOCKS
    covered = len(trail.blocks) * trail.size
    assert sum(trail.blocks) / len(trail.blocks) == pytest.approx((covered - 1) / 2)
    assert records_until(Trail(), 5.0) is None


def test_the_state_goes_through_a_checkpoint_exactly():
    numbers = [(falling(i), 5 * math.exp(i / 250)) for i in range(600)]
    whole, first, second = Drift(tau=100.0), Drift(tau=100.0), Drift(tau=100.0)

    def told(drift, start, stop):
        loads = {"expert_load": {"layers.0": [0.0, 2.0]}}
        parts = [record(i + 1, loss=numbers[i][0], max_logit=numbers[i][1]) | loads for i in range(start, stop)]
        return [warning for part in parts for warning in drift.observe(part, steps=STEPS)]

    expected = told(whole, 0, 600)
    found = told(first, 0, 301)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + told(second, 301, 600) == expected
    assert expected
    assert second.state_dict() == whole.state_dict()
