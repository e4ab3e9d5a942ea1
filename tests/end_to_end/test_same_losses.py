"""The losses of a run do not depend on how it was cut over processes, nor on whether it was killed in between."""

import os
import re
import signal
import time

import pytest

from tests.end_to_end.conftest import ROOT

# QK-Clip and gradient clipping both act with these, and the learning rate is high: what differs would show.
LIVELY = (
    "optim.lr=0.01",
    "optim.tau=0.1",
    "optim.clip_grad_norm=0.5",
    "schedule.steps=20",
    "schedule.warmup_steps=2",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.precision=fp32",
    "track.log_every=1",
)


def test_two_processes_with_expert_parallelism_give_the_losses_of_one(runner):
    # All experts for each token: no near tie, decided by rounding, can send one elsewhere. tests/distributed has top 2.
    settings = (*LIVELY, "model.num_experts_per_tok=8")
    one = runner.run("one", *settings)
    assert one.returncode == 0, one.stderr
    records = [r for r in runner.records("one") if "loss" in r]
    assert len(records) == 20
    assert sum(r["clipped_heads"] > 0 for r in records) > 5  # QK-Clip acted
    assert sum(r["grad_norm"] > 0.5 for r in records) > 5  # and so did gradient clipping
    for stage, checkpointing in ((1, "selective"), (3, "full")):
        name = f"two-zero{stage}"
        cut = ("parallel.expert_parallel=2", f"parallel.zero_stage={stage}")
        again = f"train.activation_checkpointing={checkpointing}"
        scores = ("validate.questions=8", "validate.samples=1", "generate.max_tokens=8") if stage == 3 else ()
        two = runner.run(name, *settings, *cut, again, *scores, processes=2)
        assert two.returncode == 0, two.stderr
        expected, found = runner.losses("one"), runner.losses(name)
        assert found.keys() == expected.keys()
        assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-5
    records = runner.records(name)
    assert logged(records) == documented()
    assert [record["step"] for record in records if "utilisation" in record] == [10, 20]


def logged(records):
    names = set()
    for record in records:
        names |= record.keys() - {"seconds"} | {f"seconds.{part}" for part in record.get("seconds", {})}
    return names


def documented():
    rows = [line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall("`([a-z_.]+)`", row.split("|")[1])}


def test_a_killed_run_goes_on_as_if_nothing_had_been(runner):
    """Killed while its batch grows, with phases still to come."""
    lively = [word for word in LIVELY if not word.startswith(("schedule.", "train.global", "train.micro"))]
    settings = ("experiment=k2-in-small", "schedule.batch_ramp=[[4,1024],[8,2560]]", *lively)
    settings += ("train.micro_batch_size=4", "checkpoint.every=6", "validate.every=5")
    undisturbed = runner.run("undisturbed", *settings)
    assert undisturbed.returncode == 0, undisturbed.stderr

    process = runner.start("killed", *settings)
    deadline = time.monotonic() + 240
    while max(runner.losses("killed"), default=0) < 8:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert max(runner.losses("killed")) < 31

    again = runner.run("killed", *settings)
    assert again.returncode == 0, again.stderr
    assert "resuming from step" in again.stdout + again.stderr
    assert runner.losses("killed") == runner.losses("undisturbed")  # to the last bit
    validations = [[r for r in runner.records(n) if "validation_loss" in r] for n in ("killed", "undisturbed")]
    assert validations[0] == validations[1]
    expected = [*((step, False) for step in range(5, 31, 5)), (31, True)]
    assert [(r["step"], r["whole"]) for r in validations[0]] == expected


def test_a_run_goes_on_with_another_number_of_processes(runner):
    settings = (*LIVELY, "model.num_experts_per_tok=8", "checkpoint.every=10")  # as above
    first = runner.run("elastic", *settings, "parallel.expert_parallel=2", processes=2)
    assert first.returncode == 0, first.stderr
    # Forget what came after step 10, as if the two processes had been killed there.
    folder = runner.runs / "elastic"
    for path in (folder / "checkpoints").glob("step-*20"):
        os.rename(path, path.with_name("set-aside"))
    (folder / "summary.json").unlink()
    expected = runner.losses("elastic")
    second = runner.run("elastic", *settings)
    assert second.returncode == 0, second.stderr
    found = runner.losses("elastic")
    assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-5


@pytest.mark.full
def test_compiled_steps_give_the_losses_of_eager_ones(runner):
    """Within rounding, which would in time send a token to another expert: hence every token goes to all of them."""
    settings = (*LIVELY, "model.num_experts_per_tok=8", "checkpoint.every=0")
    runs = {"eager": ("false", "none"), "compiled": ("true", "none"), "compiled-full": ("true", "full")}
    for name, (compiled, mode) in runs.items():
        chosen = (f"train.compile={compiled}", f"train.activation_checkpointing={mode}")
        run = runner.run(name, *settings, *chosen)
        assert run.returncode == 0, run.stderr
    expected, found = runner.losses("eager"), runner.losses("compiled")
    assert found.keys() == expected.keys()
    assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-5
    assert runner.losses("compiled-full") == found  # to the last bit
