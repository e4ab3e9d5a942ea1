"""A checkpoint of any layout is read by any other (see ``resume``)."""

import dataclasses

import pytest

from tests.distributed.plain import Layout
from tests.distributed.resume import AXES, Job, Result, axis_of, every_job, measure, readers, refused, valid

ONE, SHARDED, OTHER = Layout(1), Layout(2, 2, 3), Layout(2, 1, 2)
ROUGH = Layout(2, 2, 1, "bf16")
OWN = Layout(1, own="own_rules.Counting")
QUICK = [
    *(Job(SHARDED), Job(ROUGH), Job(SHARDED, SHARDED), Job(ROUGH, ROUGH)),
    *(Job(ONE), Job(ONE, SHARDED), Job(OWN), Job(OWN, OWN)),
    Job(OTHER, ONE),
]
OWN_SHARDED = Layout(2, 2, 3, own="own_rules.Counting")
OWN_ROUGH, OWN_SECOND = Layout(2, 2, 1, "bf16", own="torch.optim.NAdam"), Layout(2, 1, 2, own="torch.optim.NAdam")
OWN_LAYOUTS = [
    *(Job(OWN_SHARDED), Job(OWN_SHARDED, OWN_SHARDED)),
    *(Job(OWN_ROUGH), Job(OWN_ROUGH, OWN_ROUGH), Job(OWN_SECOND), Job(OWN_SECOND, OWN_SECOND)),
    *(Job(OWN), Job(OWN, OWN_SHARDED)),
    Job(dataclasses.replace(OWN_SECOND, own=OWN.own), OWN),
]


def check(result: Result) -> None:
    """What every reading must hold."""
    print(result)
    assert result.state_exact
    if result.layout == result.source:
        assert result.same_records
        assert result.same_weights
    assert result.drift <= 1e-4
    assert result.loss <= 1e-5


def test_a_run_goes_on_in_its_own_layout_to_the_last_bit_and_in_others_to_rounding(tmp_path):
    results = measure(QUICK, tmp_path)
    assert len(results) == 5
    for result in results:
        check(result)
    assert any(not result.same_weights for result in results)  # rounding is seen where there is some


def test_the_full_tier_has_every_layout_and_every_change_of_one_axis():
    layouts, jobs = valid(), readers()
    assert (len(layouts), len(refused())) == (18, 9)
    for source in layouts:
        assert sum(job.source == source != job.layout for job in jobs) >= 3
        assert Job(source, source) in jobs
    changes = {
        (axis, getattr(j.source, axis), getattr(j.layout, axis)) for j in jobs if (axis := axis_of(j.source, j.layout))
    }
    values = {"processes": (1, 2, 4), "expert_parallel": (1, 2, 4), "zero_stage": (1, 2, 3)}
    assert changes == {(axis, a, b) for axis in AXES for a in values[axis] for b in values[axis] if a != b}
    assert all("does not divide the" in why for _, why in refused())


@pytest.mark.full
def test_an_own_optimizer_in_other_layouts(tmp_path):
    results = measure(OWN_LAYOUTS, tmp_path)
    assert len(results) == 5
    for result in results:
        check(result)


@pytest.mark.full
def test_every_layout_is_read_by_others(tmp_path):
    for result in measure(every_job(), tmp_path):
        check(result)
