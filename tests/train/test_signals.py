import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2train import status
from k2train.train import signals as module
from k2train.train.signals import Signals, Stopped

ROOT = Path(__file__).parents[2]


def test_statuses():
    by_signal = {signum: status.of_signal(signum) for signum in module.SIGNALS}
    assert by_signal == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 75}


@pytest.mark.parametrize("signum", module.SIGNALS)
def test_outside_of_the_loop_a_signal_stops_at_once_and_only_once(signum):
    with Signals() as signals:
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signum)
        assert stopped.value.status == status.of_signal(signum)
        os.kill(os.getpid(), signal.SIGTERM)  # in the midst of cleaning up
        assert signals.received == signum


def test_in_the_loop_it_is_only_noted():
    seen = []

    def loop(signals):
        with signals.deferred():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGUSR1)
                seen.append(signals.received)

    with Signals() as signals, pytest.raises(Stopped) as stopped:
        loop(signals)
    assert seen == 3 * [signal.SIGUSR1]
    assert stopped.value.status == status.REQUEUE


def test_handlers_come_back_and_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        term = signal.getsignal(signal.SIGTERM)
        with Signals() as signals:
            assert signal.getsignal(signal.SIGTERM) != term
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
        assert signal.getsignal(signal.SIGTERM) == term
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def second(*signums: int, pause: float) -> list[int]:
    left: list[int] = []
    with Signals(leave=left.append) as signals:
        signals.ignore()
        for signum in signums:
            os.kill(os.getpid(), signum)
            time.sleep(pause)
    return left


def test_a_second_ctrl_c_leaves_at_once_but_not_the_echo_of_the_first(monkeypatch):
    monkeypatch.setattr(module, "ECHO", 0.1)
    assert second(signal.SIGINT, signal.SIGINT, pause=0.2) == [130]
    assert second(signal.SIGINT, signal.SIGTERM, pause=0.2) == [143]  # what torchrun makes of a second Ctrl-C
    assert second(signal.SIGTERM, signal.SIGTERM, pause=0.2) == []  # SLURM and torchrun, one after the other
    monkeypatch.setattr(module, "ECHO", 10.0)
    assert second(signal.SIGINT, signal.SIGINT, pause=0.1) == []


def test_who_does_not_go_is_made_to_go(monkeypatch):
    monkeypatch.setattr(module, "LEAVE_WITHIN", 0.2)
    left: list[int] = []
    with Signals(leave=left.append):
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    assert left == [143]


STUCK = """
import ctypes, signal
from k2train.train.signals import Signals
with Signals() as signals, signals.deferred():
    print("stuck", flush=True)
    libc = ctypes.CDLL(None)
    while True:
        libc.sleep(1000)  # as a collective: native code that no signal brings back to Python
"""
FORKED = """
import os, signal, sys, time
from k2train.train.signals import Signals
with Signals() as signals, signals.deferred():
    child = os.fork()
    if not child:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    _, how = os.waitpid(child, 0)
    time.sleep(0.2)
    print(os.WTERMSIG(how), signals.received)
"""


def start(script: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)


def test_a_second_ctrl_c_works_while_the_main_thread_hangs():
    process = start(STUCK)
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGINT)
    time.sleep(module.ECHO + 0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def test_a_forked_child_dies_of_its_own_signals_and_tells_nobody():
    process = start(FORKED)
    assert process.communicate(timeout=20)[0] == "15 0\n"
