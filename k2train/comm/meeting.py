"""The ranks of one start find each other in a store that may still hold what earlier starts wrote.

torchrun keeps one store for all its restarts, and torch puts nothing between them: a rank that starts again may read
the address that its peer had before, and connect to nobody until a timeout (pytorch issue 135712). The number of
restarts does not tell starts apart either, as each node counts its own. So the ranks shake hands here, with names that
no start had before, and then use keys that begin with the name of this start.
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from k2train.comm.exchange import FailedTogether

HELLO, START, SEEN, GO = (f"k2train/meeting/{word}" for word in ("hello", "start", "seen", "go"))
PAUSE = 0.05  # seconds between two looks


def meet(store: Store, rank: int, size: int, *, limit: timedelta) -> Store:
    """Waits until all ranks of this start have come; returns a store of their own.

    Each rank says hello with a new name. Rank 0 answers with a name for the start and the names that it has seen; it
    takes another one if a rank turns out to have said hello only now, and what was read of it was old. Who finds its
    own name there says so. Once all have, that is the start.

    Raises:
        FailedTogether: not all have come within ``limit``.
    """
    deadline = time.monotonic() + limit.total_seconds()
    start = _await_others(store, size, deadline) if rank == 0 else _join(store, rank, deadline)
    return PrefixStore(f"k2train/{start}", store)


def _await_others(store: Store, size: int, deadline: float) -> str:
    names: list[str] = []
    start = ""
    others = range(1, size)
    while True:
        found = [_read(store, f"{HELLO}/{rank}") for rank in others]
        if all(found) and found != names:
            names, start = found, uuid.uuid4().hex
            store.set(START, json.dumps([start, *names]))
        missing = [rank for rank in others if not start or _read(store, f"{SEEN}/{rank}") != start]
        if not missing:
            store.set(GO, start)
            return start
        if time.monotonic() > deadline:
            raise FailedTogether(f"of {size} ranks, these have not come in time: {', '.join(map(str, missing))}")
        time.sleep(PAUSE)


def _join(store: Store, rank: int, deadline: float) -> str:
    name, seen = uuid.uuid4().hex, ""
    store.set(f"{HELLO}/{rank}", name)
    while True:
        start, *names = json.loads(_read(store, START) or '[""]')
        if start != seen and names[rank - 1 : rank] == [name]:
            seen = start
            store.set(f"{SEEN}/{rank}", start)
        if seen and _read(store, GO) == seen:
            return seen
        if time.monotonic() > deadline:
            raise FailedTogether("rank 0 has not found all ranks in time")
        time.sleep(PAUSE)


def _read(store: Store, key: str) -> str:
    """The value, or nothing if there is none: ``get`` would wait for one."""
    return store.get(key).decode() if store.check([key]) else ""
