"""A run that is struck down ends as one that was left alone (see ``soak``)."""

import random

import pytest

from tests.distributed.soak import LIVELY, LONG, MOMENTS, TARGETS, Strike, blows, measure, run_struck

SHORT = (*LIVELY, "schedule.steps=40", "checkpoint.every=3", "validate.every=5", "parallel.expert_parallel=2")


def test_a_rank_killed_while_it_saves_and_a_cluster_that_asks_to_stop(tmp_path):
    planned = [Strike("a rank's SIGKILL", "while saving"), Strike("torchrun's SIGTERM", "some steps later")]
    struck = run_struck(tmp_path, planned, seed=0, overrides=SHORT)
    assert "which is saved: the same command goes on from there" in struck.output()
    assert struck.starts() == 3


@pytest.mark.full
def test_twelve_strikes(tmp_path):
    planned, _ = measure(tmp_path, strikes=12, seed=1, overrides=LONG)
    assert all(blow.resumed is None or blow.resumed >= blow.published for blow in planned)


def test_the_long_form_strikes_everyone_at_every_moment():
    pairs = {(blow.target, blow.moment) for blow in blows(20, random.Random(0))}
    assert pairs == {(target, moment) for target in TARGETS for moment in MOMENTS}
