"""Work that rank 0 does while all others wait for it, as long as it takes, but no longer than it gets on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]

from k2train.comm.exchange import FailedTogether

T = TypeVar("T")
ALIVE, DONE = "k2train/first/alive", "k2train/first/done"  # keys of the store
PAUSE = 0.2  # seconds between two looks, and two signs of life


def main_first(
    store: Store,
    work: Callable[[Callable[[], None]], T],
    *,
    what: str,
    limit: timedelta,
    idle: Callable[[], None] = lambda: None,
) -> T:
    """Rank 0 works; then the others do the same, and find it done.

    Args:
        store: of ``open_store``; there need be no process group yet. Used once.
        work: is given a function to call now and then, which tells the others that it gets on.
        what: is being done, for the message: "preparing the data".
        limit: without a sign of rank 0 after which the others give up.
        idle: called by the others while they wait.

    Raises:
        FailedTogether: on the others, if rank 0 failed or gets nowhere.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        return _work(store, work)
    seen, since = -1, time.monotonic()
    while not store.check([DONE]):
        if (signs := store.add(ALIVE, 0)) != seen:
            seen, since = signs, time.monotonic()
        if time.monotonic() - since > limit.total_seconds():
            raise FailedTogether(f"rank 0 has got nowhere for {limit.total_seconds():.0f} s in {what}")
        idle()
        time.sleep(PAUSE)
    if sentence := store.get(DONE).decode():
        raise FailedTogether(f"rank 0: {sentence}")
    return work(lambda: None)


def _work(store: Store, work: Callable[[Callable[[], None]], T]) -> T:
    signed = 0.0

    def alive() -> None:
        nonlocal signed
        if time.monotonic() - signed > PAUSE:
            signed = time.monotonic()
            store.add(ALIVE, 1)

    try:
        result = work(alive)
    except BaseException as error:
        store.set(DONE, str(error) or type(error).__name__)
        raise
    store.set(DONE, "")
    return result
