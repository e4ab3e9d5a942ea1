"""A step that the monitor refuses leaves no trace, on two ranks."""

import pytest

from tests.distributed.plain import Layout
from tests.monitor.skipped import run_all

FULL = [
    Layout(2, zero_stage=1, precision="bf16", accumulation=2),
    Layout(2, zero_stage=2, offload=True),
    Layout(2, zero_stage=3, accumulation=2),
    Layout(2, zero_stage=3, expert_parallel=2),
]


def check(layouts, folder):
    for layout, found in zip(layouts, run_all(layouts, folder), strict=True):
        assert all(found.values()), (layout, found)


def test_a_refused_step_leaves_no_trace(tmp_path):
    check([Layout(2, zero_stage=1)], tmp_path)


@pytest.mark.full
def test_a_refused_step_leaves_no_trace_in_any_layout(tmp_path):
    check(FULL, tmp_path)
