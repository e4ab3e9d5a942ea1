"""Why a run ended, in a sentence, said once however many ranks there are.

The traceback is in the log. When one rank of many fails, the others fail by losing their connections to it: each rank
leaves a note for the others, and those that only lost a peer stay silent, so that the first failure is what the person
reads.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from k2train import status
from k2train.config import explain, own_place
from k2train.paths import atomic_write, explain_oserror
from k2train.train.signals import Stopped

# What gloo, NCCL and torch's stores say in the ranks that lose a peer.
LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket closed",
    "failed to recv",
    "remote process exited",
    "peer closed",
    "timed out waiting",
    "timed out after",
    "wait timeout",
    "connection was likely closed",
    "ncclremoteerror",
)
# Seconds in which a rank that lost a peer waits for that peer's own word.
GRACE = 1.0


@dataclass(frozen=True)
class Failure:
    """How a rank ended, as it leaves it to the others in ``rank-N.error.json``."""

    rank: int
    time: float  # seconds since the epoch
    sentence: str
    lost_peer: bool  # whether it failed only since another one did


def report_failure(error: BaseException, *, rank: int, world_size: int, log_path: Path, stderr: TextIO) -> int:
    """Writes the traceback to the log and tells the person, if this rank is the one to speak.

    To be called while the process group still stands: leaving it is what makes the other ranks fail.

    Args:
        error: what ended the run.
        rank: of this process.
        world_size: processes of the run.
        log_path: the rank's log; other ranks' failures are looked for in its folder, as far as they share a disk.
        stderr: the person's, from ``quiet``.

    Returns:
        The exit status of the process.
    """
    print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
    if isinstance(error, KeyboardInterrupt):
        error = Stopped(signal.SIGINT, told=False)
    own = Failure(rank, time.time(), describe(error), lost_peer(error))
    if isinstance(error, Stopped):
        _tell(f"k2train: {error}", own, _publish(own, log_path.parent), stderr=None if error.told else stderr)
        return error.status
    others = _publish(own, log_path.parent)
    if own.lost_peer and not others:
        time.sleep(GRACE)
        others = _others(own, log_path.parent)
    message = _message(own, others, world_size=world_size, log_path=log_path, expected=_is_expected(error))
    _tell(message, own, others, stderr=stderr)
    return status.FAILED


def report_hang(sentence: str, *, rank: int, world_size: int, log_path: Path, stderr: TextIO) -> int:
    """As ``report_failure``, for a rank that no longer gets anywhere; works beside a main thread that hangs.

    Args:
        sentence: says where it hangs, and where the stacks of its threads are.
        rank: of this process.
        world_size: processes of the run.
        log_path: the rank's log.
        stderr: the person's, from ``quiet``.

    Returns:
        The exit status of the process.
    """
    own = Failure(rank, time.time(), sentence, lost_peer=False)
    message = f"k2train: rank {rank} of {world_size} hangs: {sentence}"
    print(message, file=sys.stderr, flush=True)
    _tell(message, own, _publish(own, log_path.parent), stderr=stderr)
    return status.HUNG


def forget_failures(folder: Path, *, rank: int, world_size: int) -> None:
    """Removes what earlier starts have left: this rank's note, and by rank 0 those of ranks that are no more."""
    _error_path(folder, rank).unlink(missing_ok=True)
    if rank == 0:
        for failure, path in _failures(folder):
            if failure.rank >= world_size:
                path.unlink(missing_ok=True)


def describe(error: BaseException) -> str:
    """One sentence on an error: our own messages as they are, others with their kind, and where in one's own code."""
    if isinstance(error, OSError) and error.errno is not None:
        return explain_oserror(error) + own_place(error)
    text = str(error).strip()
    if text and _is_expected(error):
        return text
    return explain(error)


def lost_peer(error: BaseException) -> bool:
    """Whether the error says that another process went away, rather than what went wrong in this one."""
    from k2train.comm import FailedTogether  # not above: it brings torch, which may print

    if isinstance(error, FailedTogether):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | ConnectionError) and any(sign in text for sign in LOST_PEER)


def _is_expected(error: BaseException) -> bool:
    """Whether the message is written for the person: one of k2train's refusals, or what the system refused."""
    if isinstance(error, Stopped):
        return True
    if isinstance(error, OSError):
        return error.errno is not None
    return status.is_refusal(error)


def _speaks(own: Failure, others: list[Failure]) -> bool:
    """Whether this rank's failure is the first of those that explain something.

    Of ranks that lost a peer only the first speaks, and only if no rank said what went wrong: the peer was killed.
    """
    better = [f for f in others if f.lost_peer <= own.lost_peer]
    return not any(f.lost_peer < own.lost_peer or (f.time, f.rank) < (own.time, own.rank) for f in better)


def _message(own: Failure, others: list[Failure], *, world_size: int, log_path: Path, expected: bool) -> str:
    sentence = own.sentence
    if own.lost_peer:
        failed = [f"rank {f.rank}" for f in others if not f.lost_peer]
        lost = f"{', '.join(failed)} failed" if failed else "another process ended without a word (out of memory?)"
        sentence = f"stopped, as {lost}: {sentence}"
    what = f"rank {own.rank} failed" if world_size > 1 else "error" if expected else "the run failed"
    return f"k2train: {what}: {sentence}\nthe full traceback is in {log_path}"


def _tell(message: str, own: Failure, others: list[Failure], *, stderr: TextIO | None) -> None:
    """Says the message unless another rank is the one to speak, and leaves it to torchrun in any case."""
    speaks = _speaks(own, others)
    _tell_torchrun(message, when=own.time if speaks else own.time + 1)
    if speaks and stderr is not None:
        start = "\n" if stderr.isatty() else ""  # a live panel of a rank that was killed leaves the cursor mid-line
        print(f"{start}{message}", file=stderr, flush=True)


def _publish(own: Failure, folder: Path) -> list[Failure]:
    """Leaves this rank's failure for the others and returns theirs.

    Written first and read afterwards, so that of two ranks failing at once at least one sees the other.
    """
    try:
        atomic_write(_error_path(folder, own.rank), json.dumps(asdict(own)))
    except OSError as error:  # the run may have failed since its disk is full: the sentence must still come out
        logging.getLogger(__name__).warning("cannot leave a note for other ranks: %s", explain_oserror(error))
    return _others(own, folder)


def _others(own: Failure, folder: Path) -> list[Failure]:
    return [failure for failure, _ in _failures(folder) if failure.rank != own.rank]


def _failures(folder: Path) -> Iterator[tuple[Failure, Path]]:
    for path in sorted(folder.glob("rank-*.error.json")):
        try:
            yield Failure(**json.loads(path.read_text(encoding="utf-8"))), path
        except FileNotFoundError:
            continue  # its rank has just started anew


def _error_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.error.json"


def _tell_torchrun(message: str, *, when: float) -> None:
    """Leaves the message where torchrun takes its "root cause" from, which it prints last of all.

    The format is torch.distributed.elastic.multiprocessing.errors'; the earliest time stamp is the root cause.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": message, "timestamp": str(int(when))}
    try:
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
    except OSError as error:
        logging.getLogger(__name__).warning("torchrun will not know the cause: %s", explain_oserror(error))
