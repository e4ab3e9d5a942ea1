"""How a command ends: refusals and exit statuses.

A ``ValueError`` that this project's own code raises, as ``DataError`` and ``CheckpointError``, is a refusal: its
message says what was wrong, where, and what to do, and is shown as it is. Any other is a bug, shown with its traceback.

An exit status is what a launcher, a batch script or a person's shell learns from how a process ended.

Every status but ``OK`` makes torchrun start all ranks again, as long as it has restarts left; docs/faults.md has the
table of what leads to which.
"""

from __future__ import annotations

import signal
import traceback

OK = 0
FAILED = 1  # the run cannot go on as it is; the message says why
USAGE = 2  # it was asked for wrongly
REQUEUE = 75  # stopped by SIGUSR1 with all saved: start me again (EX_TEMPFAIL of sysexits.h)
HUNG = 124  # nothing went on for too long (as timeout(1) has it)
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


def of_signal(signum: int) -> int:
    """The status of a process that a signal has asked to stop: 128 + its number as in a shell, but for SIGUSR1."""
    return REQUEUE if signum == signal.SIGUSR1 else 128 + signum


def is_refusal(error: BaseException) -> bool:
    """Whether the message is written for the person."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return isinstance(error, ValueError) and module.split(".")[0] in ("k2train", "muonclip")
