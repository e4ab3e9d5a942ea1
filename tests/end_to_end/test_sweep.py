"""Real sweeps by the command line."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[2] / "k2train" / "config"
SMALL = [
    *("schedule.steps=6", "checkpoint.every=2", "validate.every=0", "validate.tokens=256", "generate.max_tokens=4"),
    *("train.global_batch_size=4", "train.micro_batch_size=4", "train.sequence_length=32"),
    *("model.num_hidden_layers=2", "model.n_routed_experts=4", "model.hidden_size=32"),
]
GRID = ["optim.lr=0.01,0.02", "model.qk_rope_head_dim=8,16", "seed=1,2,3"]


def start(runner, name):
    text = runner.folder / "text"  # that nobody changes meanwhile
    if not text.exists():
        shutil.copytree(CONFIG, text)
    words = runner.settings(name, *SMALL, *GRID, f"data.path={text}")
    return subprocess.Popen(
        [sys.executable, "-m", "k2train", "train", "--multirun", "--jobs=4", *words],
        env=runner.environment(),
        cwd=runner.folder,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.full
def test_a_sweep_of_twelve_runs_killed_five_times_ends_with_the_same_table(runner):
    whole = start(runner, "whole")
    said, _ = whole.communicate(timeout=1800)
    assert whole.returncode == 0, said
    killed = runner.runs / "killed"
    for kill in range(5):
        process = start(runner, "killed")
        deadline = time.monotonic() + 600
        while len(list(killed.glob("*/summary.json"))) < 2 * kill + 1:  # then the next runs are under way
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if kill % 2:  # with what it has started, as when a machine goes down; else alone
            started = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
            for child in map(int, started.split()):
                os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()
    last = start(runner, "killed")
    said, _ = last.communicate(timeout=1800)
    assert last.returncode == 0, said
    table = (killed / "table.csv").read_text()
    assert len(table.splitlines()) == 1 + 4
    assert table == (runner.runs / "whole" / "table.csv").read_text()
    assert "12 of 12 runs are finished" in start(runner, "killed").communicate(timeout=600)[0]
