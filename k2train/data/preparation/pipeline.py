"""The stages of a preparation: survey, verdicts, tokenizer, encoding, and last of all the manifest.

The result lies in a folder of the cache that is named by everything it depends on: the settings and the listing of the
sources (path, size and modification time of each file). Preparing the same text again finds the manifest there and
reads no file. A run that was stopped at any point left no manifest; the next one keeps what is whole. What comes out
depends on settings and text alone: not on interruptions, and not on the number of processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from k2train.config import DataConfig, SourceConfig, TokenizerConfig
from k2train.data.errors import DataError, os_errors_explained
from k2train.data.manifest import (
    BLOCK_BYTES,
    FORMAT,
    MANIFEST_NAME,
    VERSION,
    describe_file,
    describe_split,
    write_digests,
    write_manifest,
)
from k2train.data.preparation.encode import LaneTask, Made, encode_lane, join_held_out, plan_lane
from k2train.data.preparation.survey import Lane, Survey, Tick, lanes_of, read_survey, rows_of, survey
from k2train.data.preparation.verdicts import TRAIN, Plan, decide
from k2train.data.preparation.workers import Workers
from k2train.data.sources import Corpus, cut_pieces, find_corpus, located
from k2train.data.tokenizer import Tokenizer, choose_engine, define
from k2train.paths import atomic_write

Progress = Callable[[str, int, int], None]  # stage ("wait", "read", "tokenizer", "encode"), bytes done, bytes in all

TOKENIZER_NAME = "tokenizer.json"
LOCK_NAME = "lock"
WORK_NAME = "work"  # folder of what is needed until the manifest is written
DECISIVE = ("dedup", "near_threshold", "held_out", "shard_bytes", "tokenizer")  # settings that enter, beside sources
TRAINING_BYTES = 128 << 20  # text that the tokenizer is trained on, at most: merges hardly change with more
TRAINING_LANES = 256  # that this text is taken from, at most
# On which the fast engine's ids are compared: how many documents, how much of each, of how many lanes and of which of
# their rows at most.
CHECKED_DOCUMENTS, CHECKED_CHARACTERS, CHECKED_LANES, CHECKED_ROWS = 64, 1 << 12, 4, 256


def prepare(config: DataConfig, *, cache: Path, progress: Progress) -> Path:
    """Makes the data set that ``config`` describes, unless the cache has it, and returns its manifest.

    Two processes that prepare the same data set do not disturb each other: the second waits and finds it done.

    Args:
        config: sources, split and tokenizer.
        cache: the folder in which data sets are kept.
        progress: called with (stage, bytes done, bytes in all).

    Raises:
        DataError: no text, too little of it, or the file system refuses; one sentence with the way on.
    """
    if config.prepared:
        from k2train.data.cache import find_dataset  # not above: it brings torch, which workers do without

        return find_dataset(config.prepared, cache=cache, limit=config.cache_bytes)
    with os_errors_explained(cache):
        sources, corpora, folder = _place(config, cache)
        manifest_path = folder / MANIFEST_NAME
        if manifest_path.is_file():
            return manifest_path
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / LOCK_NAME, progress) as progress:
            if not manifest_path.is_file():
                manifest = _make(config, sources, corpora, folder, progress)
                _remove_leftovers(folder, manifest)
                write_manifest(folder, manifest)
    return manifest_path


def find_prepared(config: DataConfig, *, cache: Path) -> Path | None:
    """The manifest of what ``prepare`` has made of ``config``; None: it has not.

    Raises:
        DataError: its text cannot be found.
    """
    with os_errors_explained(cache):
        path = _place(config, cache)[2] / MANIFEST_NAME
        return path if path.is_file() else None


def _place(config: DataConfig, cache: Path) -> tuple[dict[str, SourceConfig], dict[str, Corpus], Path]:
    """The sources, what they hold, and the folder of the data set."""
    sources = located(config)
    corpora = {name: find_corpus(source, name, apart_from=cache) for name, source in sources.items()}
    return sources, corpora, cache / "data" / f"{'+'.join(corpora)}-{_key(config, sources, corpora)}"


def _key(config: DataConfig, sources: Mapping[str, SourceConfig], corpora: Mapping[str, Corpus]) -> str:
    """Names the result before any file is read."""
    settings = {key: value for key, value in asdict(config).items() if key in DECISIVE}
    settings["sources"] = {name: _settings(source) for name, source in sources.items()}
    listings = {
        name: {"root": corpus.root, "files": [(file.origin, file.size, file.mtime_ns) for file in corpus.files]}
        for name, corpus in corpora.items()
    }
    path = config.tokenizer.path and Path(config.tokenizer.path).expanduser()
    tokenizer = hashlib.sha256(path.read_bytes()).hexdigest() if path else None
    depends_on = {"version": VERSION, "config": settings, "tokenizer": tokenizer, "sources": listings}
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def _settings(source: SourceConfig) -> dict[str, Any]:
    settings = asdict(source) | {"path": None}  # the listing has it
    if not source.own:
        del settings["options"]  # so that what was prepared before there were any is found
    return settings


def _make(
    config: DataConfig, sources: dict[str, SourceConfig], corpora: dict[str, Corpus], folder: Path, progress: Progress
) -> dict[str, Any]:
    pieces = {name: cut_pieces(source, corpora[name], size=config.shard_bytes) for name, source in sources.items()}
    lanes = list(lanes_of(pieces, size=config.shard_bytes))
    with Workers(min(len(lanes), config.workers or os.cpu_count() or 1)) as workers:
        return _Preparation(config, sources, corpora, folder, progress, workers).make(lanes)


@dataclass(frozen=True)
class _Preparation:
    """All that the stages share."""

    config: DataConfig
    sources: dict[str, SourceConfig]
    corpora: dict[str, Corpus]
    folder: Path
    progress: Progress
    workers: Workers

    def make(self, lanes: list[Lane]) -> dict[str, Any]:
        """Runs the stages and returns the manifest."""
        tokenizer = self.config.tokenizer
        given = None if tokenizer.kind == "bpe" else define(tokenizer, ())  # refused before all the text is read
        (self.folder / WORK_NAME).mkdir(exist_ok=True)
        self._run("read", lanes, partial(_survey, self.folder, self.sources, self.config.dedup == "near"))
        plan = decide(
            lanes,
            partial(_read_survey, self.folder),
            self.folder / WORK_NAME / "verdicts",
            sources=self.sources,
            dedup=self.config.dedup,
            near_threshold=self.config.near_threshold,
            share=self.config.held_out,
        )
        described = self._make_tokenizer(lanes, plan, given)
        made = self._encode(lanes, plan, described)
        return self._manifest(plan, described, made)

    def _run(
        self, stage: str, lanes: list[Lane], work: Callable[[Any, Tick], Any], tasks: Iterable[Any] | None = None
    ) -> list[Any]:
        """``work`` of each lane (or of the tasks that stand for them), shared out to processes."""
        total = max(1, sum(lane.size for lane in lanes))
        tasks = lanes if tasks is None else tasks
        results = list(
            self.workers.map(work, tasks, progress=lambda done: self.progress(stage, min(done, total), total))
        )
        self.progress(stage, total, total)  # of a sample not all is read
        return results

    def _make_tokenizer(self, lanes: list[Lane], plan: Plan, given: str | None) -> dict[str, Any]:
        """Writes the tokenizer, trained on a sample of the text unless it is given, and describes it."""
        config = self.config.tokenizer
        trained = given is None
        wanted = TRAINING_BYTES if trained else CHECKED_DOCUMENTS * CHECKED_CHARACTERS
        shuffled = sorted(lanes, key=lambda lane: xxhash.xxh3_64_intdigest(f"{lane.number}".encode()))
        chosen = shuffled[: TRAINING_LANES if trained else CHECKED_LANES]
        rows = None if trained else CHECKED_ROWS
        tasks = ((lane, plan.of(lane)[:rows].copy(), -(-wanted // len(chosen))) for lane in sorted(chosen, key=_number))
        found = self._run("tokenizer", chosen, partial(_sample, self.folder, self.sources), tasks)
        texts = [text for part in found for text in part]
        definition = define(config, texts) if given is None else given
        atomic_write(self.folder / TOKENIZER_NAME, definition)
        sample = texts[:: max(1, len(texts) // CHECKED_DOCUMENTS)]
        cut = (text[:CHECKED_CHARACTERS] for text in sample)
        tokenizer = choose_engine(definition, cut, end_of_text=config.end_of_text)
        return describe_file(self.folder, TOKENIZER_NAME) | {
            "engine": tokenizer.engine,
            "end_of_text": config.end_of_text,
            "vocab_size": tokenizer.vocab_size,
        }

    def _encode(self, lanes: list[Lane], plan: Plan, described: dict[str, Any]) -> dict[str, dict[str, list[Made]]]:
        """Writes the shards: by source and split."""
        units = dict.fromkeys(self.sources, 0)
        parts: dict[str, list[tuple[str, str]]] = {name: [] for name in self.sources}
        first = {lane.source: plan.starts[lane.number] for lane in reversed(lanes)}

        def tasks() -> Iterator[LaneTask]:
            for lane in lanes:
                task = plan_lane(
                    lane,
                    _read_survey(self.folder, lane),
                    plan.of(lane),
                    first_document=plan.starts[lane.number] - first[lane.source],
                    first_unit=units[lane.source],
                    size=self.config.shard_bytes,
                    tokenizer=f"{described['sha256']} {described['engine']} {described['end_of_text']}",
                    work=WORK_NAME,
                )
                units[lane.source] += len(task.units)
                if task.held_out:
                    parts[lane.source].append((task.held_out.name, task.held_out.digest))
                yield task

        for name in self.sources:
            (self.folder / name).mkdir(exist_ok=True)
        work = partial(_encode, self.folder, self.sources, self.config.tokenizer, described["engine"])
        shards = self._run("encode", lanes, work, tasks())
        made: dict[str, dict[str, list[Made]]] = {name: {"train": [], "held_out": []} for name in self.sources}
        for lane, found in zip(lanes, shards, strict=True):
            made[lane.source]["train"] += found
        for name in self.sources:
            made[name]["held_out"] = join_held_out(self.folder, name, parts[name], size=self.config.shard_bytes)
        return made

    def _manifest(
        self, plan: Plan, described: dict[str, Any], made: dict[str, dict[str, list[Made]]]
    ) -> dict[str, Any]:
        multiple = self.config.tokenizer.pad_to_multiple
        sources = {}
        for name, splits in made.items():
            digests = {split: [digest for _, digest in part] for split, part in splits.items()}
            sources[name] = {
                "digests": write_digests(self.folder, name, digests),
                "splits": {split: describe_split([record for record, _ in part]) for split, part in splits.items()},
            }
        return {
            "format": FORMAT,
            "version": VERSION,
            "block_bytes": BLOCK_BYTES,
            "tokenizer": described,
            "padded_vocab_size": -(-described["vocab_size"] // multiple) * multiple,
            "sources": sources,
            "about": {
                "sources": {name: corpus.title for name, corpus in self.corpora.items()},
                "held_out": self.config.held_out,
                "skipped": {
                    name: {
                        reason.value: count for reason, count in (corpus.skipped + plan.skipped[name]).items() if count
                    }
                    for name, corpus in self.corpora.items()
                },
                "asked_vocab_size": self.config.tokenizer.vocab_size if self.config.tokenizer.kind == "bpe" else 0,
            },
        }


def _number(lane: Lane) -> int:
    return lane.number


def _survey_path(folder: Path, lane: Lane) -> Path:
    return folder / WORK_NAME / f"survey-{lane.number:05d}.safetensors"


def _survey(folder: Path, sources: dict[str, SourceConfig], signatures: bool, lane: Lane, tick: Tick) -> None:
    survey(_survey_path(folder, lane), sources[lane.source], lane, signatures=signatures, tick=tick)


@lru_cache(maxsize=16)
def _read_survey(folder: Path, lane: Lane) -> Survey:
    path = _survey_path(folder, lane)
    if (found := read_survey(path)) is None:
        raise DataError(f"{path} was damaged while it was needed: start the same command again")
    return found


def _sample(
    folder: Path, sources: dict[str, SourceConfig], task: tuple[Lane, np.ndarray[Any, Any], int], tick: Tick
) -> list[str]:
    """Texts of a lane to train on: in the order of their digests, up to so many bytes."""
    lane, verdicts, wanted = task
    found = _read_survey(folder, lane)
    trained = np.flatnonzero(verdicts == TRAIN)
    order = trained[np.lexsort((found.digests[trained, 1], found.digests[trained, 0]))]
    before = np.cumsum(found.sizes[order]) - found.sizes[order]
    chosen = set(order[before < wanted].tolist())
    rows = itertools.islice(rows_of(sources[lane.source], lane, tick), max(chosen, default=-1) + 1)
    return [row.content for number, row in enumerate(rows) if number in chosen and isinstance(row.content, str)]


def _encode(
    folder: Path, sources: dict[str, SourceConfig], config: TokenizerConfig, engine: str, task: LaneTask, tick: Tick
) -> list[Made]:
    tokenizer = _tokenizer(folder / TOKENIZER_NAME, engine, config.end_of_text)
    source = sources[task.lane.source]
    return encode_lane(folder, source, task, _read_survey(folder, task.lane), tokenizer, tick)


@lru_cache(maxsize=1)
def _tokenizer(path: Path, engine: str, end_of_text: str) -> Tokenizer:
    return Tokenizer(path.read_text(encoding="utf-8"), engine=engine, end_of_text=end_of_text)


def _remove_leftovers(folder: Path, manifest: dict[str, Any]) -> None:
    """Removes what was needed on the way, and what interrupted runs have left beside the files of the manifest."""
    shutil.rmtree(folder / WORK_NAME)
    kept = {LOCK_NAME, TOKENIZER_NAME}
    for source in manifest["sources"].values():
        kept.add(source["digests"]["file"])
        kept.update(file for part in source["splits"].values() for file in part["shards"]["file"])
    for path in folder.rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in kept:
            path.unlink()


@contextmanager
def _alone(path: Path, progress: Progress) -> Iterator[Progress]:
    """Holds a lock that the operating system releases when the process ends, however it ends.

    Who holds it touches its file at every progress, told by way of what this yields. Who waits tells of ``wait`` at
    each of these, and of nothing if nothing goes on there: whoever is told decides how long to wait.
    """
    with path.open("a") as file:
        seen = None
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if (touched := os.fstat(file.fileno()).st_mtime_ns) != seen:
                    progress("wait", 0, 1)
                seen = touched
                time.sleep(0.2)

        def touching(stage: str, done: int, total: int) -> None:
            os.utime(file.fileno())
            progress(stage, done, total)

        yield touching
