"""What the detector finds in curves that are known, and what it must not find."""

import dataclasses
import json
import math

import pytest

from k2train.config import MonitorConfig
from k2train.monitor import Monitor
from k2train.monitor.detector import LEAST, PATIENCE, Rule, Series, observe, resistant_line, surprise
from tests.monitor.curves import Curve

CONFIG = MonitorConfig(
    action="log",
    rewinds=3,
    rewind_window=16,
    window=64,
    loss_deviations=8,
    grad_norm_deviations=12,
    document_deviations=10,
)
# What a fault did to the loss, in nats, in runs of small models whose noise was 0.05: half a batch random the least.
CORRUPTION = 1.2


def decisions(curve, changes=None, monitor=None):
    """The decision on each step; ``changes`` are functions of (loss, gradient norm), by step."""
    monitor = monitor or Monitor(CONFIG)
    for step, numbers in enumerate(curve):
        loss, norm = (changes or {}).get(step, lambda *pair: pair)(*numbers)
        yield monitor.decide(loss=loss, grad_norm=norm, document=loss + 0.5, phase=0)


def flagged(curve, changes=None):
    return [step for step, decision in enumerate(decisions(curve, changes)) if decision.findings]


def worse(loss, norm):
    return loss + CORRUPTION, norm


def better(loss, norm):
    return loss - CORRUPTION, norm


def test_smooth_runs_raise_no_alarm():
    curves = [Curve(noise=noise, seed=seed) for noise in (0.005, 0.02, 0.05) for seed in (100, 101, 102, 103, 104)]
    alarms = [(curve, step) for curve in curves for step in flagged(curve)]
    assert len(alarms) <= sum(curve.steps for curve in curves) / 5000, alarms


@pytest.mark.parametrize(
    ("change", "signal", "steps"),
    [
        (worse, "loss", [20, 40, 60, 500, 900, 990]),
        (
            better,
            "loss",
            [20, 40, 500, 900, 990],
        ),  # a text that is known by heart
        (lambda loss, norm: (loss, norm * 1000), "grad_norm", [20, 40, 60, 500, 900, 990]),
    ],
    ids=["worse", "better", "gradient"],
)
def test_a_spike_is_found_at_once(change, signal, steps):
    for seed in (1, 2, 3):
        found = list(decisions(Curve(seed=seed), dict.fromkeys(steps, change)))
        for step in steps:
            assert [finding.signal for finding in found[step].findings] == [signal], (seed, step)
            assert found[step].apply  # as the action is to log


def test_skip_refuses_a_rise_alone():
    monitor = Monitor(dataclasses.replace(CONFIG, action="skip"))
    found = list(decisions(Curve(steps=120, seed=1), {90: better, 100: worse}, monitor))
    assert [step for step, decision in enumerate(found) if not decision.apply] == [100]
    assert "deviations below" in found[90].sentence()
    assert "deviations above" in found[100].sentence()


def test_one_bad_document_is_told_and_refuses_nothing():
    monitor = Monitor(dataclasses.replace(CONFIG, action="skip"))
    for step, (loss, norm) in enumerate(Curve(steps=300, seed=1)):
        odd = step in (150, 290)
        found = monitor.decide(loss=loss, grad_norm=norm, document=loss + 5.0 * odd + 0.7, phase=0)
        assert [finding.signal for finding in found.findings] == ["document"] * odd, step
        assert found.apply


def test_what_is_raised_a_little_for_two_steps_is_told_at_the_second():
    raised = dict.fromkeys((700, 701), lambda loss, norm: (loss + 0.25, norm * 1.9))
    for seed in (1, 2, 3):
        found = list(decisions(Curve(seed=seed), raised, Monitor(dataclasses.replace(CONFIG, action="skip"))))
        told = [step for step, decision in enumerate(found) if decision.findings]
        assert told == [701], seed
        assert found[701].apply  # what has happened is not undone by refusing the next update


def test_going_back_is_asked_for_by_a_rise_alone():
    monitor = Monitor(dataclasses.replace(CONFIG, action="rewind"))
    found = list(decisions(Curve(steps=120, seed=1), {90: better, 100: worse}, monitor))
    assert [step for step, decision in enumerate(found) if decision.rewind] == [100]
    assert not found[100].apply


def test_a_second_spike_ten_steps_later_is_found():
    for seed in (1, 2, 3):
        found = flagged(Curve(seed=seed, steps=250), {200: worse, 210: worse})
        assert {200, 210} <= set(found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("signal", ["loss", "grad_norm"])
def test_what_is_not_finite_is_never_applied_and_blinds_nobody(bad, signal):
    def spoil(loss, norm):
        return (bad, norm) if signal == "loss" else (loss, bad)

    curve = Curve(seed=4, steps=300)
    found = list(decisions(curve, {0: spoil, 200: spoil, 201: worse, 230: worse}))
    assert not found[0].apply  # before anything is known
    assert not found[200].apply
    assert found[200].findings[0].signal == signal
    assert found[200].sentence().endswith("is not finite")
    assert found[201].findings
    assert found[230].findings
    assert len([1 for decision in found if decision.findings]) == 4


def test_what_is_not_finite_leaves_no_trace_in_the_history():
    monitor = Monitor(CONFIG)
    list(decisions(Curve(steps=50), monitor=monitor))
    before = monitor.state_dict()
    monitor.decide(loss=math.nan, grad_norm=1.0, document=math.nan, phase=3)
    assert monitor.state_dict() == before


def test_a_new_level_is_accepted():
    after = dict.fromkeys(range(300, 1000), worse)
    found = flagged(Curve(seed=5), after)
    assert found == list(range(300, 300 + PATIENCE))


def test_a_new_phase_begins_anew():
    monitor = Monitor(CONFIG)
    list(decisions(Curve(steps=100, seed=6), monitor=monitor))
    assert not monitor.decide(loss=9.0, grad_norm=100.0, document=9.0, phase=1).findings


def test_the_history_goes_through_a_checkpoint_exactly():
    curve = list(Curve(seed=7, steps=200))
    undisturbed, first = Monitor(CONFIG), Monitor(CONFIG)
    changes = {98: worse, 101: worse}
    expected = list(decisions(curve, changes, undisturbed))
    list(decisions(curve[:100], changes, first))
    second = Monitor(CONFIG)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = {step - 100: change for step, change in changes.items()}
    assert list(decisions(curve[100:], rest, second)) == expected[100:]
    assert second.state_dict() == undisturbed.state_dict()


def test_observing_changes_nothing_that_was_given():
    series = Series(tuple(2.0 + 0.01 * (i % 3) for i in range(LEAST)))
    rule = Rule(deviations=8, floor=0.02, window=64)
    finding, flagged, after = observe(series, 3.0, rule, signal="loss")
    assert (finding.value, flagged, after.values, after.flagged) == (3.0, True, series.values, (3.0,))
    finding, flagged, _ = observe(series, 1.0, rule, signal="loss")
    assert finding.deviations < -8
    assert not flagged  # only rises are asked for
    assert observe(Series(series.values[1:]), 3.0, rule, signal="loss")[0] is None  # too little is known


def test_the_line_is_that_of_a_line_and_one_wild_value_does_not_move_it():
    values = [5.0 - 0.1 * i for i in range(30)]
    assert resistant_line(values) == pytest.approx((-0.1, 5.0))
    values[12] = 100.0
    slope, offset = resistant_line(values)
    assert (slope, offset) == pytest.approx((-0.1, 5.0))
    # Between the trend, 2.0, and the level of the last ten, 2.55, nothing surprises.
    assert surprise(values, 2.3, floor=0.1) == pytest.approx((2.3, 0.0))
    assert surprise(values, 2.75, floor=0.1) == pytest.approx((2.55, 2.0))
    assert surprise(values, 1.8, floor=0.1) == pytest.approx((2.0, -2.0))
