"""What the loop does about faults: it stops where all ranks have agreed to, and goes on where a disk refuses."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable

from k2train.checkpoint import SaveError
from k2train.comm import start_max
from k2train.train.saving import Saver
from k2train.train.signals import Stopped
from k2train.train.watchdog import beat

# Seconds between two attempts at the last save.
PAUSE = 10.0


class StopRequest:
    """Whether a signal has reached any rank; all of them learn it after the same step."""

    def __init__(self, received: Callable[[], int]) -> None:
        """``received`` gives the number of the signal that has reached this rank, 0 for none."""
        self._received = received
        self._answer: Callable[[], int] = lambda: 0

    def ask(self) -> None:
        """Sends this rank's number on its way; called by all ranks before the update of a step."""
        self._answer = start_max(self._received())

    def answer(self) -> int:
        """The signal that the ranks stop for after this step, the same on each; 0 to go on."""
        return self._answer()


class PatientSaver:
    """A run's saves, of which none but the last can end it; called as Saver is, by all ranks together."""

    def __init__(
        self, saver: Saver, *, save: Callable[[], None], every: int, within: float, say: Callable[[str], None]
    ) -> None:
        """Prepares.

        Args:
            saver: writes; a disk that refuses is the same SaveError on all ranks.
            save: begins a save by ``saver``, with all that belongs to it.
            every: steps between two saves, for the message; 0: only at the end.
            within: seconds that ``save_last`` goes on trying.
            say: tells the person a sentence.
        """
        self._saver, self._save, self._every, self._say = saver, save, every, say
        self._attempts = 1 + int(within // PAUSE)

    def check(self, step: int) -> None:
        """Tells what became of a save in flight, if that is known; after each step."""
        try:
            self._saver.check()
        except SaveError as error:
            self._tell(error, step)

    def save(self, step: int) -> None:
        """Begins to save, once the save before has come to its end, however."""
        for attempt in (self._saver.wait, self._save):
            try:
                attempt()
            except SaveError as error:
                self._tell(error, step)

    def save_last(self) -> None:
        """Saves, and returns when that is done.

        Raises:
            SaveError: the disk has refused for as long as it may.
        """
        for left in reversed(range(self._attempts)):
            try:
                self._save_now()
            except SaveError as error:
                if not left:
                    raise
                self._say(f"{error}; trying again every {PAUSE:.0f} s, {left} times at most")
                beat("waiting for room on the disk")
                time.sleep(PAUSE)
            else:
                break

    def stop(self, signum: int, step: int) -> Stopped:
        """Saves without patience, and tells what the run stopped for; what is returned is to be raised."""
        name = signal.Signals(signum).name
        try:
            self._save_now()
        except SaveError as error:
            self._say(f"stopped by {name} after step {step}. {error}; the same command goes on from the one before")
        else:
            self._say(f"stopped by {name} after step {step}, which is saved: the same command goes on from there")
        return Stopped(signum, told=True)

    def _save_now(self) -> None:
        with contextlib.suppress(SaveError):  # of an older step
            self._saver.wait()
        self._save()
        self._saver.wait()

    def _tell(self, error: SaveError, step: int) -> None:
        again = f"step {step - step % self._every + self._every}" if self._every else "the end"
        self._say(f"{error}; the run goes on, and saves again at {again}")
