"""Lanes shared out to processes: progress, failures, and workers that do not outlive the one that they work for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from k2train.data.errors import DataError
from k2train.data.preparation.survey import Tick

Task = TypeVar("Task")
Result = TypeVar("Result")

POLL = 0.2  # seconds between two looks at the progress
STOPPED = -1  # takes the place of the bytes done: workers are to end

_done: Any = None  # in a worker: bytes done by all of them, shared


def over(
    tasks: Iterable[Task],
    work: Callable[[Task, Tick], Result],
    *,
    workers: int,
    progress: Callable[[int], None],
) -> Iterator[Result]:
    """``work`` of each task, in the order of the tasks, by as many processes as are asked for and needed.

    Args:
        tasks: may be pickled, as ``work`` and what it returns; only a few are taken ahead.
        work: is given a task, and what to tell the bytes done.
        workers: one works in this process.
        progress: called with the bytes done so far.

    Raises:
        DataError: a worker was killed; or what ``work`` raises.
    """
    if workers <= 1:
        done = 0

        def tick(size: int) -> None:
            nonlocal done
            done += size
            progress(done)

        for task in tasks:
            yield work(task, tick)
        return
    # Spawned, not forked: a fork of a process that has threads, as torch's, may hang.
    context = multiprocessing.get_context("spawn")
    shared = context.Value("q", 0)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(shared,)) as pool:
        try:
            waiting: list[Future[Result]] = []
            for task in tasks:
                waiting.append(pool.submit(_call, work, task))
                if len(waiting) == 4 * workers:
                    yield from _first(waiting, shared, progress)
            while waiting:
                yield from _first(waiting, shared, progress)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that prepares data was killed, perhaps as memory ran out: lower data.workers or "
                "data.shard_bytes and start the same command again; what is finished is kept"
            ) from error
        finally:
            with shared.get_lock():
                shared.value = STOPPED
            pool.shutdown(wait=True, cancel_futures=True)


def _first(waiting: list[Future[Result]], shared: Any, progress: Callable[[int], None]) -> Iterator[Result]:
    told = None
    while not waiting[0].done():
        wait(waiting[:1], timeout=POLL, return_when=FIRST_COMPLETED)
        if told != shared.value:  # who waits for this process is told only while it gets on
            progress(told := shared.value)
    yield waiting.pop(0).result()


def _begin(shared: Any) -> None:
    global _done
    _done = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a person's Ctrl-C; the parent says when to end
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    with suppress(OSError):
        wait_for([parent.sentinel])
    os._exit(1)


def _call(work: Callable[[Task, Tick], Result], task: Task) -> Result:
    def tick(size: int) -> None:
        with _done.get_lock():
            if _done.value == STOPPED:
                raise KeyboardInterrupt
            _done.value += size

    return work(task, tick)
