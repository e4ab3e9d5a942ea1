"""The terminal belongs to the run: what libraries print, from Python or from C++, goes to the log file of the rank.

``quiet`` is called before the noisy imports. It works on the file descriptors, so that nothing can print past it, and
hands out what was the terminal until then. ``report_failure`` says there, in a sentence, why a run ended; the
traceback is in the log. When one rank of many fails, the others fail by losing their connections to it; they stay
silent, so that the first failure is what the person reads.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from k2train.paths import atomic_write, explain_oserror

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
    "connection was likely closed",
    "ncclremoteerror",
)
# Seconds in which a rank that lost a peer waits for that peer's own word.
GRACE = 1.0


class Quiet:
    """The person's streams while descriptors 1 and 2 lead to a log file; ``restore`` undoes it, as does ``with``.

    A run leaves it in force until the process has ended: libraries also print on their way out.
    """

    def __init__(self, log_path: Path) -> None:
        """Redirects. Raises OSError, with nothing changed, if the log cannot be opened."""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._before = sys.stdout, sys.stderr
        for stream in self._before:
            stream.flush()
        # Duplicates are not inherited: a compiler that a library starts has only the log to print to.
        self.out, self.err = (_open(os.dup(fd), like=s) for fd, s in zip((1, 2), self._before, strict=True))
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        # New objects, as the old ones buffer by what the descriptor was when Python started.
        sys.stdout, sys.stderr = (
            open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            for fd in (1, 2)
        )
        self._handler = logging.StreamHandler(sys.stderr)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        self._level = root.level
        root.addHandler(self._handler)
        root.setLevel(logging.INFO)
        self._watches_faults = not faulthandler.is_enabled()
        if self._watches_faults:
            faulthandler.enable(sys.stderr)

    def restore(self) -> None:
        """Puts the terminal back; the person's streams must no longer be used."""
        if self._watches_faults:
            faulthandler.disable()
        root = logging.getLogger()
        root.removeHandler(self._handler)
        root.setLevel(self._level)
        for ours in (sys.stdout, sys.stderr, self.out, self.err):
            ours.flush()
        os.dup2(self.out.fileno(), 1)
        os.dup2(self.err.fileno(), 2)
        sys.stdout, sys.stderr = self._before
        self.out.close()
        self.err.close()

    def __enter__(self) -> Quiet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.restore()


def _open(descriptor: int, *, like: TextIO) -> TextIO:
    # A character that the terminal cannot show must not end a run.
    return open(descriptor, "w", buffering=1, encoding=getattr(like, "encoding", None) or "utf-8", errors="replace")


def quiet(log_path: Path, *, rank: int, world_size: int) -> Quiet:
    """Sends all output of this process to its log, and forgets failures of earlier starts in the same folder.

    Args:
        log_path: ``<logs>/rank-N.log``; appended to.
        rank: of this process.
        world_size: processes of this start; rank 0 also cleans up after ranks beyond it.

    Raises:
        OSError: the log cannot be written; see ``k2train.paths.explain_oserror``.
    """
    streams = Quiet(log_path)
    print(f"==== started {time.strftime('%Y-%m-%d %H:%M:%S')}, rank {rank} of {world_size}, pid {os.getpid()} ====")
    _error_path(log_path.parent, rank).unlink(missing_ok=True)
    if rank == 0:
        for failure, path in _failures(log_path.parent):
            if failure.rank >= world_size:
                path.unlink(missing_ok=True)
    return streams


def without_shm_comm() -> None:
    """Has DeepSpeed use plain gloo on the CPU; to be called before ``deepspeed.init_distributed``.

    DeepSpeed otherwise builds an extension for shared memory at first use: it takes a compiler, time, and dies without.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# ---- failures


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
        if rank == 0:
            print("\nstopped by Ctrl-C: the same command goes on from the last checkpoint", file=stderr, flush=True)
        return 130
    own = Failure(rank, time.time(), describe(error), lost_peer(error))
    others = _publish(own, log_path.parent)
    if own.lost_peer and not others:
        time.sleep(GRACE)
        others = _others(own, log_path.parent)
    speaks = _speaks(own, others)
    message = _message(own, others, world_size=world_size, log_path=log_path, expected=_is_expected(error))
    _tell_torchrun(message, when=own.time if speaks else own.time + 1)
    if speaks:
        start = "\n" if stderr.isatty() else ""  # a live panel of a rank that was killed leaves the cursor mid-line
        print(f"{start}{message}", file=stderr, flush=True)
    return 1


def describe(error: BaseException) -> str:
    """One sentence on an error: our own messages as they are, others with their kind."""
    if isinstance(error, OSError) and error.errno is not None:
        return explain_oserror(error)
    text = str(error).strip()
    if text and _is_expected(error):
        return text
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def lost_peer(error: BaseException) -> bool:
    """Whether the error says that another process went away, rather than what went wrong in this one."""
    from k2train.comm import FailedTogether  # not above: it brings torch, which may print

    if isinstance(error, FailedTogether):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | ConnectionError) and any(sign in text for sign in LOST_PEER)


def _is_expected(error: BaseException) -> bool:
    """Whether the message is written for the person: one of k2train's refusals, or what the system refused."""
    if isinstance(error, OSError):
        return error.errno is not None
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return isinstance(error, ValueError) and module.split(".")[0] in ("k2train", "muonclip")


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
