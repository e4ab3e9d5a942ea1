"""Trackers: where metrics may go beside the local metrics.jsonl, which has all that any of them gets.

Nothing here can end a run, or hold it up. Each tracker lives in a thread of its own, which the run never waits for but
at the start and at the end, and then not for long. One that fails, or no longer keeps up, is said once and left out.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from k2train.config import TrackConfig
from k2train.paths import RunPaths
from k2train.train.hooks import Hook
from k2train.train.revision import revision
from k2train.train.track_tensorboard import TensorBoard
from k2train.train.track_wandb import Wandb, choose_mode

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer

Say = Callable[[str], None]

# Seconds that the run waits for a tracker, at the start and at the end.
OPENING, CLOSING = 70.0, 90.0
# Messages that a tracker may lag behind.
PENDING = 10_000
# Seconds between two heat maps of a kind, as each is a picture.
BETWEEN_MAPS = 60.0
# What is also drawn over tokens, by keys of records.
BY_TOKENS = ("loss", "bits_per_byte", "validation_loss", "validation_bits_per_byte")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a tracker is told of the run.

    Attributes:
        config: as plain values.
        folder: of the run.
        name: of the run.
        resumed: whether it goes on from a checkpoint.
        incidents: records of those before.
    """

    config: Mapping[str, Any]
    folder: Path
    name: str
    resumed: bool
    incidents: Sequence[Mapping[str, Any]]


class Backend(Protocol):
    """A kind of tracker. All its methods are called by one thread; what they raise ends the tracking alone."""

    name: str

    def open(self, start: Start, say: Say) -> None:
        """Begins, and says in a line where metrics go."""

    def numbers(self, values: Mapping[str, float], *, step: int, tokens: int) -> None:
        """Values by name; those that begin with ``by_tokens/`` are drawn over tokens, all others over steps."""

    def heat_map(self, name: str, rows: Sequence[Sequence[float]], *, step: int, tokens: int) -> None:
        """A number for each layer (in order) and head or expert; NaN where there is none."""

    def incident(self, record: Mapping[str, Any]) -> None:
        """A record of an incident or a warning; see docs/monitor.md."""

    def close(self, *, failed: bool) -> None:
        """Sends what is left."""


class Tracker(Hook):
    """Sends a run's metrics to trackers. Made by rank 0 alone."""

    def __init__(self, backends: Sequence[Backend], *, start: Start, say: Say) -> None:
        """Prepares; no tracker is touched yet.

        Args:
            backends: the trackers.
            start: of the run; whether it goes on, and incidents before it, are found out later.
            say: tells the person.
        """
        self._start, self._say = start, say
        self._workers = [_Worker(backend) for backend in backends]
        self._mapped_at: dict[str, float] = {}

    def start(self, trainer: Trainer) -> None:
        """See ``open``."""
        self.open(resumed_at=trainer.progress.step)

    def open(self, *, resumed_at: int) -> None:
        """Begins, and waits a little for it.

        Args:
            resumed_at: step of the checkpoint that the run goes on from; 0: it is new.
        """
        before = _incidents(RunPaths(self._start.folder).metrics, until=resumed_at)
        start = Start(**{**vars(self._start), "resumed": resumed_at > 0, "incidents": before})
        for worker in self._workers:
            worker.begin(start)
        for worker in self._workers:
            worker.wait_for_start(OPENING)
        self._tell()

    def log(self, record: Mapping[str, Any]) -> None:
        """Sends the metrics of the last steps."""
        self._numbers(_numbers(record, group="train"), record)
        for key, rows in _maps(record):
            now = time.monotonic()
            if now - self._mapped_at.get(key, -math.inf) >= BETWEEN_MAPS:
                self._mapped_at[key] = now
                self._send("heat_map", key, rows, step=record["step"], tokens=record["tokens"])
        self._tell()

    def validation(self, record: Mapping[str, Any]) -> None:
        """Sends the loss on held-out text."""
        self._numbers(_numbers(record, group="validation"), record)
        self._tell()

    def incident(self, record: Mapping[str, Any]) -> None:
        """Sends it."""
        self._send("incident", record)

    def warning(self, record: Mapping[str, Any]) -> None:
        """Sends it."""
        self._send("incident", record)

    def finish(self, *, failed: bool = False) -> None:
        """Sends what is left, within a minute or so. A second call does nothing."""
        workers, self._workers = self._workers, []
        end = time.monotonic() + CLOSING
        for worker in workers:
            worker.send("close", failed=failed)
        for worker in workers:
            worker.end(max(0.0, end - time.monotonic()))
            for sentence in worker.told():
                self._say(sentence)

    def _numbers(self, values: dict[str, float], record: Mapping[str, Any]) -> None:
        by_tokens = {f"by_tokens/{key}": record[key] for key in BY_TOKENS if _is_number(record.get(key))}
        self._send("numbers", values | by_tokens, step=record["step"], tokens=record["tokens"])

    def _send(self, method: str, *args: Any, **kwargs: Any) -> None:
        for worker in self._workers:
            worker.send(method, *args, **kwargs)

    def _tell(self) -> None:
        for sentence in (sentence for worker in self._workers for sentence in worker.told()):
            self._say(sentence)


class _Worker:
    """A tracker in its thread, which does not keep the process alive."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._name = backend, backend.name
        self._calls: queue.Queue[tuple[str, tuple[Any, ...], dict[str, Any]]] = queue.Queue(PENDING)
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._opened, self._gone = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name=f"track {self._name}", daemon=True)

    def begin(self, start: Start) -> None:
        self.send("open", start, self._said.put)
        self._thread.start()

    def wait_for_start(self, seconds: float) -> None:
        if not self._opened.wait(seconds):
            self._said.put(f"{self._name} has not answered in {seconds:.0f} s: the run begins without waiting for it")

    def send(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self._gone:
            return
        try:
            self._calls.put_nowait((method, args, kwargs))
        except queue.Full:
            self._leave_out("it no longer keeps up")

    def end(self, seconds: float) -> None:
        if self._gone:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._leave_out(f"it has not ended in {seconds:.0f} s")

    def told(self) -> Iterator[str]:
        """What there is to say since the last time; the thread itself must not write to the terminal."""
        with suppress(queue.Empty):
            while True:
                yield self._said.get_nowait()

    def _work(self) -> None:
        method = ""
        while method != "close" and not self._gone:
            method, args, kwargs = self._calls.get()
            try:
                getattr(self._backend, method)(*args, **kwargs)
            except Exception as error:  # a tracker's errors are of many kinds, and none is worth a run
                log.warning("%s failed", self._name, exc_info=error)
                self._leave_out(first_line(error))
            self._opened.set()

    def _leave_out(self, why: str) -> None:
        self._gone = True
        self._said.put(f"{self._name} failed and is left out from here on; metrics.jsonl goes on ({why})")


def build_tracker(config: TrackConfig, run_config: Mapping[str, Any], *, folder: Path, name: str, say: Say) -> Tracker:
    """The trackers that the config asks for.

    Args:
        config: ``wandb`` is auto, off, offline or online. auto is online for who is logged in to wandb, unless the
            environment variable WANDB_MODE says otherwise, and offline for everyone else.
        run_config: the run's config as plain values; shown beside the curves, with the version of the code.
        folder: of the run.
        name: of the run.
        say: tells the person.
    """
    backends: list[Backend] = []
    if (mode := choose_mode(config.wandb)) != "off":
        backends.append(Wandb(mode, project=config.project, group=config.group))
    if config.tensorboard:
        backends.append(TensorBoard())
    start = Start({**run_config, "code": revision()}, folder, name, resumed=False, incidents=())
    return Tracker(backends, start=start, say=say)


def first_line(error: Exception) -> str:
    """An error in a line."""
    first, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {first}"


# ---- what of a record goes where


def _numbers(record: Mapping[str, Any], *, group: str) -> dict[str, float]:
    """The finite numbers of a record by name: a mapping's under its key, the others under the group."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{group if key == 'sets' else key}/{path}": number for path, number in _leaves(value)}
        elif key not in ("step", "tokens") and _is_number(value):
            found[f"{group}/{key.removeprefix(f'{group}_')}"] = value
    return found


def _leaves(value: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from ((f"{key}/{path}", number) for path, number in _leaves(item))
        elif _is_number(item):
            yield key, item


def _maps(record: Mapping[str, Any]) -> Iterator[tuple[str, list[list[float]]]]:
    """What has a list of numbers for each layer."""
    for key, value in record.items():
        if isinstance(value, Mapping) and value and all(isinstance(row, list) for row in value.values()):
            yield key, [[math.nan if item is None else float(item) for item in row] for row in value.values()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _incidents(path: Path, *, until: int) -> list[Mapping[str, Any]]:
    """The records of incidents in metrics.jsonl up to a step."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        if '"incident"' in line:
            with suppress(json.JSONDecodeError):  # torn by a kill
                found.append(json.loads(line))
    return [record for record in found if record["step"] <= until]
