import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from k2train.comm import FailedTogether
from k2train.train import failures as module
from k2train.train.failures import Failure, describe, lost_peer, report_failure, report_hang
from k2train.train.quiet import quiet
from k2train.train.signals import Stopped

ROOT = Path(__file__).parents[2]


def raised(error: BaseException, *, module: str) -> BaseException:
    """The error as code of that module would raise it."""
    try:
        exec("raise error", {"__name__": module, "error": error})
    except BaseException as caught:
        return caught
    raise AssertionError


LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:53251")


@pytest.mark.parametrize(
    ("error", "module", "sentence"),
    [
        (ValueError("lr=-1 must be positive"), "k2train.model.x", "lr=-1 must be positive"),
        (ValueError("bad shape"), "torch.nn", "ValueError: bad shape"),
        (TypeError("first\nsecond"), "k2train.model.x", "TypeError: first"),
        (AssertionError(), "k2train.model.x", "AssertionError"),
        (PermissionError(13, "Permission denied", "/runs"), "posix", "/runs: there is no permission"),
    ],
)
def test_describe(error, module, sentence):
    assert describe(raised(error, module=module)).startswith(sentence)


def test_lost_peers_are_known():
    assert lost_peer(LOST)
    assert lost_peer(FailedTogether("rank 1: no"))
    assert lost_peer(ConnectionResetError(104, "Connection reset by peer"))
    assert not lost_peer(ValueError("connection reset by peer"))
    assert not lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


class Ranks:
    """Ranks failing one after the other in one folder."""

    def __init__(self, folder, monkeypatch, capfd):
        self.folder, self.monkeypatch, self.capfd = folder, monkeypatch, capfd
        monkeypatch.setattr(module, "GRACE", 0.0)

    def fail(self, rank, error, *, module="k2train.x", world_size=3):
        """What the person reads of it, and when torchrun believes it happened."""
        note = self.folder / f"torchrun-{rank}.json"
        self.monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(note))
        log_path = self.folder / f"rank-{rank}.log"
        with quiet(log_path, rank=rank, world_size=world_size) as streams:
            status = report_failure(
                raised(error, module=module), rank=rank, world_size=world_size, log_path=log_path, stderr=streams.err
            )
        assert type(error).__name__ in log_path.read_text()
        self.status = status
        self.told = json.loads(note.read_text())["message"] if note.exists() else None
        return self.capfd.readouterr().err


@pytest.fixture
def ranks(tmp_path, monkeypatch, capfd):
    return Ranks(tmp_path, monkeypatch, capfd)


def test_the_first_failure_is_the_one_that_is_read(ranks):
    log = ranks.folder / "rank-1.log"
    assert ranks.fail(1, ValueError("no")) == f"k2train: rank 1 failed: no\nthe full traceback is in {log}\n"
    first = ranks.told
    assert first["extraInfo"]["py_callstack"].startswith("k2train: rank 1 failed: no")
    assert ranks.status == 1
    assert ranks.fail(0, LOST) == ""
    assert "stopped, as rank 1 failed" in ranks.told["message"]
    assert int(ranks.told["extraInfo"]["timestamp"]) > int(first["extraInfo"]["timestamp"])
    assert ranks.fail(2, ValueError("no")) == ""


def test_a_failure_is_read_even_if_others_noticed_before(ranks):
    assert "stopped, as another process ended without a word" in ranks.fail(0, LOST)
    assert ranks.fail(2, LOST) == ""
    assert "rank 1 failed: RuntimeError: out of memory" in ranks.fail(1, RuntimeError("out of memory"), module="torch")


def test_a_new_start_forgets_old_failures(ranks):
    ranks.fail(2, ValueError("old"))
    ranks.fail(1, ValueError("old"), world_size=2)
    with quiet(ranks.folder / "rank-0.log", rank=0, world_size=2):  # rank 2 is of an earlier, larger start
        pass
    with quiet(ranks.folder / "rank-1.log", rank=1, world_size=2):
        pass
    assert "rank 0 failed: new" in ranks.fail(0, ValueError("new"), world_size=2)


def test_one_process_says_what_is_wrong_and_nothing_of_ranks(ranks):
    assert ranks.fail(0, ValueError("steps=0 must be positive"), world_size=1).startswith(
        "k2train: error: steps=0 must be positive\n"
    )
    assert ranks.fail(0, KeyError("x"), world_size=1).startswith("k2train: the run failed: KeyError: 'x'\n")


@pytest.mark.parametrize(
    ("error", "name", "status"),
    [
        (KeyboardInterrupt(), "SIGINT", 130),
        (Stopped(signal.SIGTERM, told=False), "SIGTERM", 143),
        (Stopped(signal.SIGUSR1, told=False), "SIGUSR1", 75),
    ],
)
def test_being_stopped_is_said_once_and_has_a_status_of_its_own(ranks, error, name, status):
    assert ranks.fail(1, error) == f"k2train: stopped by {name}: the same command goes on from the last checkpoint\n"
    assert ranks.status == status
    assert ranks.fail(0, error) == ""
    assert ranks.status == status
    assert ranks.fail(2, LOST) == ""


def test_what_has_been_told_is_not_told_again(ranks):
    assert ranks.fail(0, Stopped(signal.SIGTERM, told=True)) == ""
    assert (ranks.status, ranks.told["message"].split(":")[1]) == (143, " stopped by SIGTERM")


def test_of_ranks_that_hang_the_first_speaks(ranks, capfd):
    for rank in (1, 0):
        with quiet(ranks.folder / f"rank-{rank}.log", rank=rank, world_size=2) as streams:
            where = {"world_size": 2, "log_path": ranks.folder / f"rank-{rank}.log", "stderr": streams.err}
            assert report_hang("nothing went on", rank=rank, **where) == 124
    assert capfd.readouterr().err == "k2train: rank 1 of 2 hangs: nothing went on\n"
    assert ranks.fail(2, LOST) == ""


def test_a_full_disk_still_lets_the_sentence_out(ranks, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module, "atomic_write", full)
    assert "the disk is full" in ranks.fail(0, OSError(28, "No space left on device", "/runs/x"), world_size=1)


def test_notes_are_read_back(ranks):
    ranks.fail(1, ValueError("no"))
    note = json.loads((ranks.folder / "rank-1.error.json").read_text())
    assert Failure(**note).sentence == "no"


WORKER = """
import os, sys
from pathlib import Path
from k2train.train.failures import report_failure
from k2train.train.quiet import quiet
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
log_path = folder / f"rank-{rank}.log"
streams = quiet(log_path, rank=rank, world_size=2)
import torch, torch.distributed as dist
try:
    dist.init_process_group("gloo")
    if rank == 1:
        raise KeyError("what really happened")
    dist.all_reduce(torch.zeros(1))
except Exception as error:
    sys.exit(report_failure(error, rank=rank, world_size=2, log_path=log_path, stderr=streams.err))
"""


def test_torchrun_ends_with_the_first_failure(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}", "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode != 0
    assert found.stderr.count("rank 1 failed: KeyError: 'what really happened'") == 2  # ours, and torchrun's root cause
    assert "what really happened" in found.stderr.split("Root Cause")[1]
    assert "rank 0 failed" not in found.stderr.split("Root Cause")[0].split("Failures:")[0]
