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


class Workers:
    """Processes that tasks are shared out to; a context manager. One worker is this process itself."""

    def __init__(self, number: int) -> None:
        """Starts nothing yet."""
        self._number = number
        # Spawned, not forked: a fork of a process that has threads, as torch's, may hang.
        self._context = multiprocessing.get_context("spawn")
        self._shared = self._context.Value("q", 0)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._number > 1:
            self._pool = ProcessPoolExecutor(
                self._number, mp_context=self._context, initializer=_begin, initargs=(self._shared,)
            )
        return self

    def __exit__(self, *raised: object) -> None:
        if self._pool:
            with self._shared.get_lock():
                self._shared.value = STOPPED
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(
        self, work: Callable[[Task, Tick], Result], tasks: Iterable[Task], *, progress: Callable[[int], None]
    ) -> Iterator[Result]:
        """``work`` of each task, in the order of the tasks.

        Args:
            work: is given a task, and what to tell the bytes done; may be pickled, as what it is given and returns.
            tasks: only a few are taken ahead.
            progress: called with the bytes done so far.

        Raises:
            DataError: a worker was killed; or what ``work`` raises.
        """
        if self._pool is None:
            yield from _alone(work, tasks, progress)
            return
        with self._shared.get_lock():
            self._shared.value = 0
        waiting: list[Future[Result]] = []
        try:
            for task in tasks:
                waiting.append(self._pool.submit(_call, work, task))
                if len(waiting) == 4 * self._number:
                    yield from self._first(waiting, progress)
            while waiting:
                yield from self._first(waiting, progress)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that prepares data was killed, perhaps as memory ran out: lower data.workers or "
                "data.shard_bytes and start the same command again; what is finished is kept"
            ) from error
        progress(self._shared.value)

    def _first(self, waiting: list[Future[Result]], progress: Callable[[int], None]) -> Iterator[Result]:
        told = None
        while not waiting[0].done():
            wait(waiting[:1], timeout=POLL, return_when=FIRST_COMPLETED)
            if told != self._shared.value:  # who waits for this process is told only while it gets on
                progress(told := self._shared.value)
        yield waiting.pop(0).result()


def _alone(
    work: Callable[[Task, Tick], Result], tasks: Iterable[Task], progress: Callable[[int], None]
) -> Iterator[Result]:
    done = 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        progress(done)

    for task in tasks:
        yield work(task, tick)


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
