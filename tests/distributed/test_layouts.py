"""Every way of cutting a run over processes gives what one process gives (see ``layouts``)."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.layouts import Result, Run, every_layout, measure_all, shared_sequences
from tests.distributed.plain import HALF, STEPS, Layout

# Each axis once: processes, expert and sequence parallelism, stage, accumulation, overlap, offload, BF16_Optimizer,
# sub-groups. The run that moves is stopped half-way in one layout and goes on in another.
STAGE_3 = Layout(2, 2, zero_stage=3, overlap=True)
QUICK = [
    Run(Layout(1, zero_stage=2, accumulation=2), "one"),
    Run(Layout(2, precision="bf16"), "bf16", until=3),
    Run(STAGE_3, "stage 3"),
    Run(STAGE_3, "stopped", until=HALF),
    Run(STAGE_3, "stopped"),
    Run(STAGE_3, "moved", until=HALF),
    Run(Layout(2, 1, zero_stage=2, offload=True, sequence_parallel=2), "moved"),
    Run(Layout(2, 2, zero_stage=3, recompute="full", sub_group_size=3000), "sub-groups"),
    Run(Layout(4, 4, offload=True, sequence_parallel=2), "four"),
]


def check(result: Result, sample: str) -> None:
    """What every layout must hold."""
    print(result)
    assert result.orthogonalised == (1, 1)
    assert result.bad_step_ignored
    if result.layout.zero_stage == 3:  # no process ever had all weights
        most, bound = result.held
        assert 0 < most <= bound
    if result.layout.precision == "bf16":  # routing differs by rounding: the loss alone can be compared
        assert result.optimizer == "BF16_Optimizer"
        assert result.loss <= 2e-2
        return
    stage3 = result.layout.zero_stage == 3
    assert result.optimizer == ("DeepSpeedZeroOptimizer_Stage3" if stage3 else "DeepSpeedZeroOptimizer")
    assert result.flips == 0
    assert result.worst_drift <= 1e-4
    assert result.loss <= 1e-5
    assert result.telemetry <= 1e-3
    assert result.held_out <= 1e-5
    assert result.sample == sample


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[tuple[Run, Result]]:
    results = measure_all(QUICK, tmp_path_factory.mktemp("layouts"))
    return list(zip(QUICK, results, strict=True))


def test_each_axis_gives_what_one_process_gives(measured):
    for run, result in measured:
        assert result.layout == run.layout
        check(result, measured[0][1].sample)
        if run.name not in ("bf16", "stopped", "moved"):
            assert result.clipped_heads > 20  # QK-Clip acted
            assert result.clipped_gradients > 5  # and so did gradient clipping


def test_a_run_that_was_stopped_at_stage_3_goes_on_to_the_last_bit(measured):
    whole = next(result for run, result in measured if run.name == "stage 3")
    resumed = next(result for run, result in measured if run == Run(STAGE_3, "stopped"))
    assert (resumed.drift, resumed.worst_drift, resumed.held_out) == (whole.drift, whole.worst_drift, whole.held_out)


@pytest.mark.full
@pytest.mark.parametrize("all_layouts", [every_layout, shared_sequences])
def test_every_layout_gives_what_one_process_gives(tmp_path: Path, all_layouts: Callable[[], list[Layout]]):
    layouts = all_layouts()
    results = measure_all([Run(layout, f"run{number}") for number, layout in enumerate(layouts)], tmp_path)
    assert [r.layout for r in results] == layouts
    for result in results:
        check(result, results[0].sample)
        assert result.clipped_heads > 20
        assert result.clipped_gradients > 5


@pytest.mark.full
def test_runs_go_on_with_sequences_shared_out_otherwise(tmp_path: Path):
    runs = []
    for first, then in ((1, 2), (2, 1), (2, 4)):
        for layout, until in ((first, HALF), (then, STEPS)):
            runs.append(Run(Layout(4, 2, zero_stage=2, sequence_parallel=layout), f"{first} to {then}", until))
    results = measure_all(runs, tmp_path)
    for run, result in zip(runs, results, strict=True):
        if run.until == STEPS:
            check(result, results[1].sample)
