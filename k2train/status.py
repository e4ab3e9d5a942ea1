"""Exit statuses: what a launcher, a batch script or a person's shell learns from how a process ended.

Every status but ``OK`` makes torchrun start all ranks again, as long as it has restarts left; docs/faults.md has the
table of what leads to which.
"""

from __future__ import annotations

import signal

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
