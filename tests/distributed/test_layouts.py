"""Every way of cutting a run over processes gives what one process gives (see ``layouts``)."""

from pathlib import Path

import pytest

from tests.distributed.layouts import Layout, Result, Run, every_layout, measure_all

# Each axis once: processes, expert parallelism, stage, accumulation, overlap, offload, and BF16_Optimizer.
QUICK = [
    Layout(1, zero_stage=2, accumulation=2),
    Layout(2, 1, zero_stage=1, precision="bf16"),
    Layout(2, 2, zero_stage=3, overlap=True),
    Layout(4, 4, zero_stage=1, offload=True),
]


def check(result: Result, sample: str) -> None:
    """What every layout must hold."""
    print(result)
    assert result.orthogonalised == (1, 1)
    assert result.clipped_heads > 20  # QK-Clip acted
    assert result.clipped_gradients > 5  # and so did gradient clipping
    if result.layout.precision == "bf16":  # routing differs by rounding: the loss alone can be compared
        assert result.optimizer == "BF16_Optimizer"
        assert result.loss <= 2e-2
        return
    stage3 = result.layout.zero_stage == 3
    assert result.optimizer == ("DeepSpeedZeroOptimizer_Stage3" if stage3 else "DeepSpeedZeroOptimizer")
    assert result.flips == 0
    assert result.worst_drift <= 1e-4
    assert result.loss <= 1e-5
    assert result.held_out <= 1e-5
    assert result.sample == sample


def test_each_axis_gives_what_one_process_gives(tmp_path: Path):
    results = measure_all([Run(layout, f"run{number}") for number, layout in enumerate(QUICK)], tmp_path)
    assert [r.layout for r in results] == QUICK
    for result in results:
        check(result, results[0].sample)


@pytest.mark.full
def test_every_layout_gives_what_one_process_gives(tmp_path: Path):
    layouts = every_layout()
    results = measure_all([Run(layout, f"run{number}") for number, layout in enumerate(layouts)], tmp_path)
    assert [r.layout for r in results] == layouts
    for result in results:
        check(result, results[0].sample)
