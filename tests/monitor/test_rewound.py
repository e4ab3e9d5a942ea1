"""A run that goes back goes on as one that never had the samples which it leaves out, on two ranks."""

import pytest

from tests.distributed.plain import Layout
from tests.monitor.rewound import run_all


def check(layouts, folder, *, killed):
    for layout, found in zip(layouts, run_all(layouts, folder, killed=killed), strict=True):
        assert all(found.values()), (layout, found)


def test_a_run_that_goes_back_never_had_the_samples(tmp_path):
    check([Layout(2, zero_stage=1)], tmp_path, killed=False)


@pytest.mark.full
def test_a_run_that_goes_back_never_had_the_samples_in_any_layout(tmp_path):
    layouts = [
        Layout(2, zero_stage=1),
        Layout(2, zero_stage=1, precision="bf16", accumulation=2),
        Layout(2, zero_stage=3, accumulation=2),
        Layout(2, zero_stage=3, expert_parallel=2),
    ]
    check(layouts, tmp_path, killed=True)
