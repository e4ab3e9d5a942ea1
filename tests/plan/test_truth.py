"""What the plan says of real runs is what they hold and send (see ``runs``)."""

from pathlib import Path

import pytest

from tests.distributed.plain import Layout
from tests.plan.published import published
from tests.plan.runs import KINDS, STATE, Result, every_layout, measure_all

# Each stage, ep, precision, accumulation and recomputation once.
FEW = [
    Layout(2, 2, 1, accumulation=2),
    Layout(2, 1, 2, "bf16", accumulation=2),
    Layout(2, 2, 3, recompute="full"),
]


def check(result: Result) -> None:
    """Bytes that are held within 2 %, bytes that are sent within 1 %, kind by kind."""
    print(result)
    errors = result.errors()
    assert all(errors[name] <= 0.02 for name in STATE)
    assert all(error <= 0.01 for name, error in errors.items() if name in KINDS)


@pytest.mark.full
def test_a_few_layouts_hold_and_send_what_was_planned(tmp_path):
    results = measure_all(FEW, tmp_path)
    assert [result.layout for result in results] == FEW
    for result in results:
        check(result)
        assert {"gradient reduce", "parameter gather", "Muon exchange"} <= result.measured.keys()
    assert "expert all-to-all" in results[0].measured


@pytest.mark.full
def test_all_layouts_hold_and_send_what_was_planned(tmp_path):
    for result in measure_all(sorted(every_layout(), key=lambda layout: layout.processes), tmp_path):
        check(result)


@pytest.mark.full
def test_the_page_has_what_is_planned_of_published_trainings():
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    assert "\n".join(published()) in page, "run: python -m tests.plan.truth docs/plan.md"
