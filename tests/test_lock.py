import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2train.lock import held_alone
from k2train.paths import explain_oserror

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from k2train.lock import held_alone
with held_alone(Path(sys.argv[1]), patience=0, busy="is here"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "lock"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_is_there_and_gets_in_once_the_first_is_gone(tmp_path, holder):
    begin = time.monotonic()
    with (
        pytest.raises(OSError, match="is here; go away") as refused,
        held_alone(tmp_path / "lock", patience=0.5, busy="is here; go away"),
    ):
        pass
    assert 0.5 <= time.monotonic() - begin < 5
    assert explain_oserror(refused.value).startswith(f"{tmp_path}: another process (pid {holder.pid} on ")
    holder.send_signal(signal.SIGKILL)
    with held_alone(tmp_path / "lock", patience=5, busy="is here"):
        assert f"pid {os.getpid()} " in (tmp_path / "lock").read_text()


def test_a_long_wait_is_told_of_once(tmp_path, holder, monkeypatch, caplog):
    monkeypatch.setattr("k2train.lock.TELL_AFTER", 0.1)
    with pytest.raises(OSError, match="is here"), held_alone(tmp_path / "lock", patience=0.6, busy="is here"):
        pass
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: waiting for another process (pid {holder.pid} on {socket.gethostname()})"
    ]


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    def refuse(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with held_alone(tmp_path / "lock", patience=0, busy="is here"):
        pass
    assert "knows no locks" in caplog.text
