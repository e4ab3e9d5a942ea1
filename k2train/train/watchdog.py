"""Notices that a run no longer gets anywhere, leaves the stacks of all threads behind, and ends the process.

A rank that hangs takes all others with it, silently: they wait in a collective. The thread here needs no word from the
main thread to see that. As the process ends with a failure, torchrun starts all ranks again from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from k2train.paths import explain_oserror
from k2train.units import duration

# Seconds between two looks at most. When there are several times as many, this process itself was stopped (Ctrl-Z, a
# machine without time for it): that is no hang.
TICK = 1.0
LONGEST = 3.0  # ticks that a gap counts for at most


_current: Watchdog | None = None  # there is one process to watch, and one to watch it


def beat(phase: str, *, limited: bool = True) -> None:
    """There was progress; ``phase`` is what the process does from now on. Of no effect where nothing watches.

    Args:
        phase: for the message: "step 12: update".
        limited: False for what takes as long as it takes, and for which no other rank waits.
    """
    if _current is not None:
        _current.beat(phase, limited=limited)


class Watchdog:
    """Watches from ``with`` on, and is meanwhile the one that ``beat`` speaks to."""

    def __init__(
        self,
        limit: float,
        *,
        stacks: Path,
        hung: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares; nothing is watched yet.

        Args:
            limit: seconds without a beat after which the process is given up.
            stacks: file for the stacks of all threads; appended to.
            hung: is told a sentence and must end the process, without help from the main thread.
            clock: seconds that never run backwards.
        """
        self.limit = limit
        self._stacks, self._hung, self._clock = stacks, hung, clock
        self._beat: tuple[str, bool] = ("starting", True)
        self._done = threading.Event()

    def beat(self, phase: str, *, limited: bool = True) -> None:
        """See the function of this name."""
        self._beat = (phase, limited)  # a new object each time: that it is another one is what the thread looks for

    def __enter__(self) -> Watchdog:
        global _current
        _current = self
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        global _current
        _current = None
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        tick = min(TICK, self.limit / 10)
        seen, still, before = self._beat, 0.0, self._clock()
        while not self._done.wait(tick):
            now = self._clock()
            still = still + min(now - before, LONGEST * tick) if self._beat is seen and seen[1] else 0.0
            seen, before = self._beat, now
            if still >= self.limit:
                self._hung(f"nothing went on for {duration(still)} in {seen[0]}; {self._dump(seen[0])}")
                return

    def _dump(self, phase: str) -> str:
        """Writes the stacks of all threads, and says where they are."""
        title = f"==== {time.strftime('%Y-%m-%d %H:%M:%S')}, pid {os.getpid()}, in {phase} ====\n"
        try:
            with self._stacks.open("a", encoding="utf-8") as file:
                file.write(title)
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            print(title, file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
            return f"the stacks are in the log, as {explain_oserror(error)}"
        return f"the stacks of its threads are in {self._stacks}"
