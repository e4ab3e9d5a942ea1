"""The loss is a mean over the tokens of the global batch however it is cut; what is not finite leaves no trace."""

import multiprocessing

import pytest

from tests.distributed.numbers import Case, run_all
from tests.distributed.plain import Layout, write_text

CASES = {
    1: [
        Case("uneven", Layout(1, zero_stage=1)),
        Case("uneven", Layout(1, zero_stage=2, accumulation=2)),
        Case("uneven", Layout(1, zero_stage=3, accumulation=4)),
        Case("phases", Layout(1, accumulation=4, zero_stage=1, offload=True)),
    ],
    2: [
        Case("uneven", Layout(2, zero_stage=2)),
        Case("uneven", Layout(2, zero_stage=3, expert_parallel=2, accumulation=2)),
        Case("uneven", Layout(2, zero_stage=1, accumulation=4)),
        Case("phases", Layout(2, accumulation=2, zero_stage=3)),
    ],
}
VETOES = {
    1: [Layout(1, zero_stage=2, accumulation=2)],
    2: [
        Layout(2, zero_stage=1, precision="bf16", accumulation=2),
        Layout(2, zero_stage=3, expert_parallel=2, accumulation=2),
        Layout(2, zero_stage=2, precision="bf16", offload=True),  # DeepSpeed itself would keep what is not finite
    ],
}
FULL = [
    Layout(2, zero_stage=stage, precision=precision, accumulation=accumulation, offload=offload)
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
    for accumulation in (1, 2)
    for offload in (False, True)
    if not (offload and precision == "bf16" and stage == 1)  # BF16_Optimizer does not know it
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    multiprocessing.set_forkserver_preload(["tests.distributed.numbers", "deepspeed.runtime.zero.muon.muon_optimizer"])
    made = tmp_path_factory.mktemp("numbers")
    write_text(made)
    return made


@pytest.mark.parametrize("size", [1, 2])
def test_each_token_counts_alike_and_a_bad_step_for_nothing(folder, size):
    results = run_all(size, CASES[size], VETOES[size], folder)
    print(results)
    for case in CASES[size]:
        found = results[repr(case)]
        assert found["loss"] <= 1e-5, case
        assert found["norm"] <= 1e-4, case
        assert found["weight"] <= 1e-5, case
    for layout in VETOES[size]:
        assert all(results[repr(layout)].values()), (layout, results[repr(layout)])


@pytest.mark.full
def test_a_bad_step_counts_for_nothing_in_any_layout(folder):
    results = run_all(2, [], FULL, folder)
    for layout in FULL:
        assert all(results[repr(layout)].values()), (layout, results[repr(layout)])
