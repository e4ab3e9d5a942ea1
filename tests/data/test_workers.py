"""Tasks shared out to processes. No torch is imported here, as each of them imports this module."""

import os
import signal
import subprocess
import sys
import time

import pytest

from k2train.data.errors import DataError
from k2train.data.preparation.workers import Workers


def square(task: int, tick) -> int:
    time.sleep(0.3 if task == 0 else 0)
    tick(10)
    return task * task


def die(task: int, tick) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    tick(1)
    return task


def fail(task: int, tick) -> int:
    if task == 3:
        raise DataError("file 3 is damaged")
    return task


@pytest.mark.parametrize("number", [1, 2])
def test_results_come_in_order_and_progress_rises(number):
    with Workers(number) as workers:
        for _ in range(2):
            done: list[int] = []
            assert list(workers.map(square, range(6), progress=done.append)) == [0, 1, 4, 9, 16, 25]
            assert done == sorted(done)
            assert done[-1] == 60


def test_a_worker_that_is_killed_is_one_clear_sentence():
    with (
        pytest.raises(DataError, match="a process that prepares data was killed, perhaps as memory ran out: lower"),
        Workers(2) as workers,
    ):
        list(workers.map(die, range(6), progress=lambda done: None))


@pytest.mark.parametrize("number", [1, 2])
def test_what_fails_in_a_worker_fails_here(number):
    with pytest.raises(DataError, match="file 3 is damaged"), Workers(number) as workers:
        list(workers.map(fail, range(6), progress=lambda done: None))


def test_workers_need_no_torch():
    code = "import sys, k2train.data.preparation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
