"""The engine of sweeps, with a program that stands in for the training."""

import copy
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from k2train.cli import main
from k2train.cli.multirun import run_config
from k2train.config import RunConfig, parse, to_dict
from k2train.experiments.launch import local
from k2train.experiments.sweep import Sweep, read_rows, varied
from k2train.lock import is_held

STAND_IN = Path(__file__).with_name("stand_in.py")
COMMAND = (sys.executable, str(STAND_IN))
GRID = [[f"optim.lr={lr}", f"seed={seed}"] for lr in (0.01, 0.03) for seed in (1, 2)]


@functools.cache
def base():
    return to_dict(run_config(["experiment=tiny"]))


def compose(words):
    """As the command line does, in a thousandth of the time."""
    config = copy.deepcopy(base())
    for word in words:
        key, _, text = word.partition("=")
        group, _, name = key.rpartition(".")
        (config[group] if group else config)[name] = json.loads(text)
    return parse(RunConfig, config)


def sweep(folder, runs):
    return Sweep(folder, runs, compose=compose, command=COMMAND)


def starts(folder):
    """How often each run was started."""
    return sorted(len(path.read_text().splitlines()) for path in folder.glob("*/starts"))


def test_each_run_has_a_folder_and_a_row(tmp_path):
    rows = sweep(tmp_path / "s", GRID).run(local(2), tell=print)
    assert [row.results["validation_bits_per_byte"] for row in rows] == pytest.approx([2.0014, 2.0024, 2.001, 2.002])
    assert [(row.settings["optim.lr"], row.settings["seed"]) for row in rows] == [
        (lr, seed) for lr in (0.01, 0.03) for seed in (1, 2)
    ]
    assert rows[0].folder.name.startswith("lr-0.01_seed-1_")
    assert varied(rows) == ["optim.lr", "seed"]
    assert "track.group=s" in rows[0].overrides


def test_what_is_finished_is_not_started_again_however_it_is_written(tmp_path):
    sweep(tmp_path, GRID).run(local(2), tell=print)
    told = []
    again = [["seed=2", "optim.lr=1e-2"], ["seed=3", "optim.lr=0.01"]]  # one is new
    rows = sweep(tmp_path, again).run(local(), tell=told.append)
    assert [row.state for row in rows] == ["finished", "finished"]
    assert starts(tmp_path) == [1, 1, 1, 1, 1]
    assert told[0] == "1 of 2 runs are finished"
    assert len(read_rows(tmp_path)) == 5


def test_a_change_of_all_runs_makes_others_and_a_harmless_one_does_not(tmp_path):
    sweep(tmp_path, GRID[:2]).run(local(2), tell=print)
    sweep(tmp_path, [[*words, "train.threads=1"] for words in GRID[:2]]).run(local(2), tell=print)
    assert starts(tmp_path) == [1, 1]
    sweep(tmp_path, [[*words, "schedule.steps=5"] for words in GRID[:2]]).run(local(2), tell=print)
    assert starts(tmp_path) == [1, 1, 1, 1]


def test_runs_that_differ_in_what_is_harmless_are_several(tmp_path):
    assert len(sweep(tmp_path, [["train.threads=1"], ["train.threads=2"]]).run(local(2), tell=print)) == 2


def test_a_failure_is_recorded_and_tried_again(tmp_path):
    runs = [["optim.lr=2"], ["optim.lr=0.03"]]
    rows = sweep(tmp_path, runs).run(local(), tell=print)
    assert [row.failure for row in rows] == ["ended with status 1: the loss is not finite", None]
    assert [row.state for row in read_rows(tmp_path)] == ["finished", "failed"]
    sweep(tmp_path, runs).run(local(), tell=print)
    assert starts(tmp_path) == [1, 2]


def test_a_sweep_that_is_killed_leaves_what_the_next_start_waits_for(tmp_path):
    slow = [[*words, "generate.temperature=1"] for words in GRID[:2]]
    code = f"""
        from pathlib import Path
        from k2train.cli.multirun import run_config
        from k2train.experiments.launch import local
        from k2train.experiments.sweep import Sweep
        compose = lambda words: run_config(["experiment=tiny", *words])
        Sweep(Path({str(tmp_path)!r}), {slow}, compose=compose, command={COMMAND}).run(local(), tell=print)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    while not starts(tmp_path):
        time.sleep(0.01)
    with pytest.raises(OSError, match="goes on with this sweep"):
        sweep(tmp_path, slow).run(local(), tell=print)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    rows = sweep(tmp_path, slow).run(local(2), tell=print)
    assert [row.state for row in rows] == ["finished", "finished"]
    assert starts(tmp_path) == [1, 2]


def test_from_the_command_line_with_a_search(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("k2train.experiments.sweep.TRAIN", COMMAND)
    words = ["--jobs=2", f"runs_dir={tmp_path}", "name=s", "seed=1", "optim.lr=interval(0.01,0.1)"]
    for trials in (1, 3):
        assert main(["train", "-m", f"--trials={trials}", *words]) == 0
    assert starts(tmp_path / "s") == [1, 1, 1]
    rates = [row.settings["optim.lr"] for row in read_rows(tmp_path / "s")]
    assert len(set(rates)) == 3
    assert all(0.01 <= rate <= 0.1 for rate in rates)
    assert len((tmp_path / "s" / "table.csv").read_text().splitlines()) == 1 + 3
    assert str(tmp_path / "s" / "table.html") in capsys.readouterr().out


def test_a_launcher_that_is_closed_stops_its_processes(tmp_path):
    words = [f"runs_dir={tmp_path.parent}", f"name={tmp_path.name}", "generate.temperature=60"]
    never = tmp_path / "never"
    launch = local()({tmp_path: [*COMMAND, *words], never: [*COMMAND]})

    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        list(launch)
    signal.signal(signal.SIGALRM, before)
    assert not is_held(tmp_path / "lock")
    assert not never.exists()
