"""What was out of the ordinary in a run, listed; and any step of it taken again, bit for bit."""

import json
import subprocess
import sys

import pytest

FAULTS = [
    "inject.allow=true",
    "inject.faults.18=gradient_nan",
    "inject.faults.22=random_tokens",
    "monitor.action=rewind",
    "monitor.rewind_window=2",
]


@pytest.mark.full
@pytest.mark.parametrize(("processes", "zero_stage"), [(1, 1), (2, 3)])
def test_a_step_is_taken_again_bit_for_bit(runner, processes, zero_stage):
    name = f"explained{processes}"
    sizes = ["schedule.steps=30", "checkpoint.every=10", "checkpoint.keep=5", f"parallel.zero_stage={zero_stage}"]
    done = runner.run(name, *sizes, *FAULTS, "train.micro_batch_size=2", processes=processes)
    assert done.returncode == 0, done.stderr
    folder = runner.runs / name
    (rewind,) = json.loads((folder / "rewinds.json").read_text())
    assert (rewind["step"], rewind["to"]) == (22, 20)

    listed = ask(runner, "incidents", folder)
    assert "the gradient is not finite" in listed.stdout
    assert "22-rewind-1" in listed.stdout

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    for step, first in ((18, 11), (25, 21)):  # one that was refused; one after the run has gone back
        found = ask(runner, "explain", folder, "--step", str(step), launcher=launcher if processes > 1 else [])
        assert found.returncode == 0, found.stdout + found.stderr
        assert f"replayed the steps {first} to {step}: all " in found.stdout
        assert "to the last bit" in found.stdout
    assert json.loads((folder / "incidents" / "18" / "incident.json").read_text())["incident"]["action"] == "skipped"
    explained = folder / "incidents" / "25"
    documents = json.loads((explained / "documents.json").read_text())["documents"]
    loss = next(record["loss"] for record in runner.records(name)[::-1] if record["step"] == 25)
    tokens = sum(row["tokens"] for row in documents)
    assert tokens == 8 * 64
    assert sum(row["loss"] * row["tokens"] for row in documents) / tokens == pytest.approx(loss, rel=1e-6)
    telemetry = json.loads((explained / "telemetry.json").read_text())
    assert all(rms > 0 for rms in telemetry["layer_update_rms"].values())
    assert telemetry["layer_grad_norm"].keys() == telemetry["layer_update_rms"].keys()


def ask(runner, command, folder, *words, launcher=()):
    line = [sys.executable, *launcher, "-m", "k2train", command, str(folder), *words]
    return subprocess.run(
        line, env=runner.environment(), cwd=runner.folder, capture_output=True, text=True, timeout=300, check=False
    )
