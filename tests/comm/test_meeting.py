import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from k2train.comm import FailedTogether
from k2train.comm.meeting import meet


def start(store, ranks, *, limit=20.0, pauses=None):
    """What each rank of a start finds of each other one, or its error."""
    found: dict[int, object] = {}

    def run(rank):
        time.sleep((pauses or {}).get(rank, 0.0))
        try:
            own = meet(store, rank, 3, limit=timedelta(seconds=limit))
        except FailedTogether as error:
            found[rank] = str(error)
            return
        assert not own.check([f"address/{rank}"])  # nothing of an earlier start
        own.set(f"address/{rank}", f"{rank} of {start.number}")
        found[rank] = [own.get(f"address/{other}").decode() for other in range(3)]

    start.number += 1
    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


start.number = 0


@pytest.mark.parametrize("late", [0, 1, 2])
def test_no_start_reads_what_an_earlier_one_wrote(late):
    store = HashStore()
    for _ in range(4):
        found = start(store, range(3), pauses={late: 0.4})
        assert found == {rank: [f"{other} of {start.number}" for other in range(3)] for rank in range(3)}


@pytest.mark.parametrize("there", [[0, 1], [1, 2], [2], [0]])
def test_who_is_missing_is_told_and_the_next_start_is_not_disturbed_by_those_who_came(there):
    store = HashStore()
    start(store, range(3))
    found = start(store, there, limit=0.5)
    if 0 in there:
        missing = ", ".join(str(rank) for rank in (1, 2) if rank not in there)
        assert found[0] == f"of 3 ranks, these have not come in time: {missing}"
    for rank in {1, 2} & set(there):
        assert found[rank] == "rank 0 has not found all ranks in time"
    found = start(store, range(3), pauses={1: 0.3})
    assert found == {rank: [f"{other} of {start.number}" for other in range(3)] for rank in range(3)}
