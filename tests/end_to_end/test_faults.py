"""Faults of real runs: what is saved, what the launcher learns, what the person reads (docs/faults.md)."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

LONG = ("schedule.steps=2000", "checkpoint.every=0", "validate.every=0", "track.log_every=1")


def until(happened, process, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def saved(runner, name: str) -> list[int]:
    return sorted(int(path.name[5:]) for path in (runner.runs / name / "checkpoints").glob("step-????????"))


def test_a_signal_saves_and_a_second_start_meanwhile_is_refused(runner):
    process = runner.start("asked", *LONG)
    until(lambda: len(runner.losses("asked")) >= 3, process)

    second = runner.run("asked", *LONG)
    assert second.returncode == 1
    assert f"another process (pid {process.pid} on " in second.stderr
    assert "trains here; wait for it to end, stop it, or give this run another name" in second.stderr
    assert process.poll() is None

    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75  # start me again
    assert err == ""
    step = int(re.search(r"stopped by SIGUSR1 after step (\d+), which is saved: the same command goes on", out)[1])
    assert saved(runner, "asked") == [step]
    assert max(runner.losses("asked")) == step
    assert (runner.runs / "asked" / "exit_status").read_text() == "75\n"


# The start may take long on a busy machine: the limit is lowered once the run trains.
HANGING = """
import time
from k2train.train import watchdog
from k2train.train.hooks import Hook
class Hanging(Hook):
    def after_step(self, step, *, applied):
        if step.number == 2:
            assert watchdog._current.limit == 100
            watchdog._current.limit = 4
            time.sleep(1000)
"""


def test_a_run_that_hangs_leaves_its_stacks_and_goes(runner, monkeypatch):
    (runner.folder / "hanging.py").write_text(HANGING)
    monkeypatch.setattr(type(runner), "environment", with_path(runner, runner.folder))
    result = runner.run("hangs", *LONG, "train.hooks.own.kind=hanging.Hanging", "faults.hang_after=100")
    assert result.returncode == 124, result.stderr
    assert "Traceback" not in result.stderr
    stacks = runner.runs / "hangs" / "logs" / "rank-0.stacks"
    assert re.search(rf"rank 0 of 1 hangs: nothing went on for [\d.]+s in step 3.*stacks.* in {stacks}", result.stderr)
    assert "hanging.py" in stacks.read_text()


def with_path(runner, folder):
    before = runner.environment()
    return lambda self: {**before, "PYTHONPATH": f"{before['PYTHONPATH']}:{folder}"}


@pytest.mark.full
def test_a_disk_that_is_full_for_a_while_loses_nothing(runner, small_disk):
    """It is filled once the run trains, and has room again some checkpoints later."""
    settings = ("schedule.steps=60", "checkpoint.every=5", "validate.every=0", "track.log_every=1")
    settings += ("faults.save_within=20",)
    small_disk.resize("40m")
    process = runner.start("full", *settings, f"runs_dir={small_disk.folder}")
    root = small_disk.folder / "full"
    log = root / "metrics.jsonl"
    until(lambda: log.exists() and log.read_text().count("\n") >= 6, process)
    ballast = small_disk.folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(small_disk.folder).free == 0
    out = ""
    for line in process.stdout:
        out += line
        if "saves again at" in line:
            ballast.unlink(missing_ok=True)
    assert process.wait(60) == 0, process.stderr.read()
    assert "the disk is full" in out
    assert re.search(r"the checkpoint of step \d+ was not saved: .*; the run goes on, and saves again at step \d+", out)
    assert [record["step"] for record in map(json.loads, log.read_text().splitlines())] == [*range(1, 61), 60]
    assert (root / "summary.json").exists()


@pytest.mark.full
def test_of_two_ranks_one_is_stopped_from_outside(runner):
    """The other one hangs, leaves its stacks and ends; torchrun kills the stopped one and starts both again."""
    settings = ("schedule.steps=40", "checkpoint.every=5", "track.log_every=1", "parallel.expert_parallel=2")
    alone = runner.run("left-alone", *settings, processes=2)
    assert alone.returncode == 0, alone.stderr
    command = runner.command("stopped", *settings, "faults.hang_after=10", processes=2)
    at = command.index("--nproc_per_node")
    command[at:at] = ["--max-restarts", "1"]
    process = subprocess.Popen(
        command,
        env=runner.environment(),
        cwd=runner.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until(lambda: len(runner.losses("stopped")) >= 7, process)
    logs = runner.runs / "stopped" / "logs"
    pid = int(re.findall(r" pid (\d+) ====", (logs / "rank-1.log").read_text())[-1])
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    until(lambda: (logs / "rank-0.stacks").exists(), process, 30)
    assert time.monotonic() - begin < 10 * 1.5 + 5
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0, out
    assert re.search(r"rank 0 of 2 hangs: nothing went on for 1\ds in step \d+", out)
    assert "resuming from step 5" in out
    assert runner.losses("stopped") == runner.losses("left-alone")


@pytest.mark.full
def test_slurms_signal_by_way_of_torchrun(runner):
    command = runner.command("slurm", *LONG, processes=2)
    at = command.index("--nproc_per_node")
    command[at:at] = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    process = subprocess.Popen(
        command, env=runner.environment(), cwd=runner.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until(lambda: len(runner.losses("slurm")) >= 3, process)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    step = int(re.search(r"stopped by SIGUSR1 after step (\d+), which is saved", out)[1])
    assert saved(runner, "slurm") == [step]
    assert (runner.runs / "slurm" / "exit_status").read_text() == "75\n"


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_saves(runner, processes):
    name = f"ctrl-c-{processes}"
    process = runner.start(name, *LONG, processes=processes)
    until(lambda: len(runner.losses(name)) >= 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "stopped by SIGINT after step" in out
    assert process.returncode == (130 if processes == 1 else 1)
    if processes == 1:
        assert err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.full
def test_a_rank_that_is_killed_is_named(runner):
    process = runner.start("killed-rank", *LONG, processes=2)
    until(lambda: len(runner.losses("killed-rank")) >= 3, process)
    log = runner.runs / "killed-rank" / "logs" / "rank-1.log"
    os.kill(int(re.findall(r" pid (\d+) ====", log.read_text())[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    ours = err.split("Root Cause")[0]
    assert "rank 0 failed: stopped, as another process ended without a word (out of memory?)" in ours
