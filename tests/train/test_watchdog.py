import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2train.train.watchdog import Watchdog, beat

ROOT = Path(__file__).parents[2]


def watch(tmp_path, *, limit=0.3, **options):
    told: list[str] = []
    return Watchdog(limit, stacks=tmp_path / "rank-0.stacks", hung=told.append, **options), told


def test_who_goes_on_is_left_alone(tmp_path):
    watchdog, told = watch(tmp_path)
    beat("nobody watches")
    with watchdog:
        for step in range(20):
            beat(f"step {step}")
            time.sleep(0.05)
    assert not told
    assert not (tmp_path / "rank-0.stacks").exists()


def test_the_same_phase_again_is_progress(tmp_path):
    watchdog, told = watch(tmp_path)
    with watchdog:
        for _ in range(20):
            watchdog.beat("a batch of the validation")
            time.sleep(0.05)
    assert not told


def test_what_has_no_limit_takes_as_long_as_it_takes(tmp_path):
    watchdog, told = watch(tmp_path)
    with watchdog:
        watchdog.beat("the report", limited=False)
        time.sleep(1)
    assert not told


def test_who_hangs_leaves_stacks_and_is_told_of(tmp_path):
    watchdog, told = watch(tmp_path)
    with watchdog:
        watchdog.beat("step 7: forward and backward")
        time.sleep(1)
    path = tmp_path / "rank-0.stacks"
    assert told == [
        f"nothing went on for {told[0].split(' for ')[1].split(' in ')[0]} in step 7: forward and backward; "
        f"the stacks of its threads are in {path}"
    ]
    text = path.read_text()
    assert "test_who_hangs_leaves_stacks_and_is_told_of" in text
    assert "in step 7: forward and backward" in text
    assert 'File "' in text
    assert "_watch" in text  # all threads


def test_stacks_that_cannot_be_written_go_to_the_log(tmp_path, capfd):
    (tmp_path / "rank-0.stacks").mkdir()
    watchdog, told = watch(tmp_path)
    with watchdog:
        time.sleep(1)
    assert "the stacks are in the log, as " in told[0]
    assert "test_stacks_that_cannot_be_written_go_to_the_log" in capfd.readouterr().err


def test_time_in_which_the_process_itself_was_stopped_does_not_count(tmp_path):
    jump = [0.0]
    watchdog, told = watch(tmp_path, limit=20.0, clock=lambda: time.monotonic() + jump[0])
    with watchdog:
        time.sleep(0.1)
        jump[0] = 3600.0
        time.sleep(2.5)  # a look or two
    assert not told


HANGS = """
import ctypes, os, sys
from pathlib import Path
from k2train.train.watchdog import Watchdog
def hung(sentence):
    print(sentence, flush=True)
    os._exit(124)
with Watchdog(0.5, stacks=Path(sys.argv[1]), hung=hung) as watchdog:
    watchdog.beat("step 3: update")
    ctypes.CDLL(None).sleep(1000)  # native code, as a collective
"""


def test_it_works_beside_a_main_thread_in_native_code(tmp_path):
    path = tmp_path / "rank-0.stacks"
    begin = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-c", HANGS, path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.monotonic() - begin < 20
    assert found.returncode == 124
    assert "in step 3: update; the stacks" in found.stdout
    assert "line 10 in <module>" in path.read_text()


def test_a_process_that_is_stopped_and_goes_on_is_not_given_up(tmp_path):
    script = HANGS.replace("0.5,", "2.0,").replace(
        "ctypes.CDLL(None).sleep(1000)", "[watchdog.beat('work') or __import__('time').sleep(0.1) for _ in range(30)]"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "x"], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == 0


@pytest.mark.parametrize("limit", [0.5, 1.5])
def test_the_limit_is_kept(tmp_path, limit):
    watchdog, told = watch(tmp_path, limit=limit)
    begin = time.monotonic()
    with watchdog:
        while not told and time.monotonic() - begin < limit + 5:
            time.sleep(0.01)
        assert limit <= time.monotonic() - begin < limit * 1.5 + 1
