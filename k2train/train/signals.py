"""Signals that ask a run to stop: the loop finishes its step and saves; outside of it the process just leaves.

SIGTERM comes from launchers and clusters, SIGINT from Ctrl-C, SIGHUP from a terminal that goes away, SIGUSR1 from
SLURM before a time limit (``--signal=USR1@120``). One may reach a single rank, or reach it twice (from SLURM and from
torchrun, which hands on what it gets). Whoever presses Ctrl-C a second time wants to leave at once.

Python runs a handler when the main thread comes back to it, which a thread in a hung collective never does. What must
work even then is done by a thread that reads the numbers of signals from a pipe.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from k2train import status

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Seconds in which a second SIGINT is the first one once more: both torchrun and what started it hand it on.
ECHO = 0.5
# Seconds for a process that is not in a step to clean up and go.
LEAVE_WITHIN = 10.0


class Stopped(BaseException):
    """The run was asked to stop. No Exception, so that no library takes it for a failure of its own."""

    def __init__(self, signum: int, *, told: bool) -> None:
        """Args are the signal's number, and whether the person has been told what became of the run."""
        super().__init__(f"stopped by {signal.Signals(signum).name}: the same command goes on from the last checkpoint")
        self.told = told
        self.status = status.of_signal(signum)


class Signals:
    """Listens from ``with`` on. Unless ``deferred``, a signal raises Stopped in the main thread, once."""

    def __init__(self, leave: Callable[[int], object] = os._exit) -> None:
        """``leave`` ends the process with a status, whatever the main thread does."""
        self.received = 0  # number of the first signal; 0: none
        self._leave = leave
        self._defers = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
                self._before[signum] = signal.signal(signum, self._handle)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._restore()
        os.write(self._write_end, b"\0")
        self._thread.join()
        os.close(self._read_end)
        os.close(self._write_end)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that no signal cuts off; it is to look at ``received`` at its own pace.

        Raises:
            Stopped: on leaving the block, if a signal has come meanwhile.
        """
        self._defers = True
        try:
            yield
        finally:
            self._defers = False
        if self.received:
            raise Stopped(self.received, told=False)

    def ignore(self) -> None:
        """Cuts nothing off any more: the process is on its way out."""
        self._defers = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, self.received or signum
        if first and not self._defers:
            raise Stopped(signum, told=False)

    def _listen(self) -> None:
        first, since, deadline = 0, 0.0, None
        while True:
            patience = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._read_end], [], [], patience)[0]:
                print(f"not gone within {LEAVE_WITHIN:.0f} s of the signal: leaving at once", file=sys.stderr)
                self._leave(status.of_signal(first))
                return
            for signum in os.read(self._read_end, 64):
                now = time.monotonic()
                if not signum:
                    return
                if signum not in self._before:
                    continue
                if not first:
                    first, since = signum, now
                    deadline = None if self._defers else now + LEAVE_WITHIN
                elif signal.SIGINT in (first, signum) and now - since > ECHO:
                    print("a second signal: leaving at once", file=sys.stderr)
                    self._leave(status.of_signal(signum))
                    return

    def _restore(self) -> None:
        signal.set_wakeup_fd(-1)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._before = {}

    def _forget(self) -> None:
        """In a forked child: it must die of its own signals, and tell its parent nothing of them."""
        if self._before:
            self._restore()
