import os
import time
from datetime import timedelta

import pytest
import torch.multiprocessing as mp
from torch.distributed import FileStore, HashStore

from k2train.comm import FailedTogether, main_first


def test_one_process_just_works():
    assert main_first(HashStore(), lambda alive: (alive(), 15)[1], what="x", limit=timedelta(seconds=1)) == 15


def _slow(alive) -> str:
    for _ in range(8):
        time.sleep(0.25)
        alive()
    return "done"


def _fails(alive) -> str:
    raise ValueError("no text there")


def _stuck(alive) -> str:
    alive()
    time.sleep(4)
    return "late"


def _meet(folder: str, name: str) -> FileStore:
    """A store, once both processes are there: one may have started seconds after the other."""
    store = FileStore(f"{folder}/{name}", 2)
    store.add("there", 1)
    while store.add("there", 0) < 2:
        time.sleep(0.01)
    return store


def _two_ranks(rank: int, folder: str) -> None:
    os.environ["RANK"] = str(rank)
    limit = timedelta(seconds=1)
    store = _meet(folder, "slow")
    begin = time.monotonic()
    if rank == 0:
        assert main_first(store, _slow, what="x", limit=limit) == "done"
    else:  # waits twice its limit, as rank 0 gets on, and finds the work done
        assert main_first(store, lambda alive: "found", what="x", limit=limit) == "found"
        assert time.monotonic() - begin > 1.5
    with pytest.raises(FailedTogether if rank else ValueError, match="no text there"):
        main_first(_meet(folder, "fails"), _fails, what="x", limit=limit)
    store = _meet(folder, "stuck")
    if rank == 0:
        assert main_first(store, _stuck, what="x", limit=limit) == "late"
    else:
        begin = time.monotonic()
        with pytest.raises(FailedTogether, match=r"rank 0 has got nowhere for 1 s in preparing"):
            main_first(store, _stuck, what="preparing", limit=limit)
        assert time.monotonic() - begin < 3.5


def test_others_wait_as_long_as_rank_0_gets_on_and_no_longer(tmp_path):
    mp.spawn(_two_ranks, args=(str(tmp_path),), nprocs=2)
