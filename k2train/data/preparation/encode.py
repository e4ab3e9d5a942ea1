"""The second pass over the text: each lane's documents become shards.

A *unit* is the documents of a shard: consecutive rows of a lane that are trained on, up to ``shard_bytes`` of text (a
longer document is a unit of its own). What is held out of a lane is little; it goes to a part of its own, and parts are
joined to shards when all lanes are done. A unit or part that an interrupted run has left whole is not made again.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from k2train.config import SourceConfig
from k2train.data.errors import DataError
from k2train.data.manifest import ShardRecord
from k2train.data.preparation.survey import Lane, Survey, Tick, digest_of, rows_of
from k2train.data.preparation.verdicts import HELD_OUT, TRAIN
from k2train.data.shards import find_shard, write_shard
from k2train.data.sources import Row, Skip
from k2train.data.tokenizer import Tokenizer

Made = tuple[ShardRecord, NDArray[np.uint64]]  # a shard and the digests of its blocks


@dataclass(frozen=True)
class Unit:
    """Rows of a lane that make up a shard or a part."""

    name: str  # of the file, relative to the data set's folder
    rows: NDArray[np.int64]  # (D,) rising
    digest: str  # of documents and tokenizer


@dataclass(frozen=True)
class LaneTask:
    """What there is to do with a lane."""

    lane: Lane
    first_document: int  # the number in its source of the lane's first row
    units: tuple[Unit, ...]  # trained on, in order
    held_out: Unit | None


def cut_units(sizes: NDArray[np.int64], *, size: int) -> Iterator[tuple[int, int]]:
    """Cuts documents into runs of up to ``size`` bytes: (start, stop) of each."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + size, side="right")))
        yield start, stop
        start = stop


def plan_lane(
    lane: Lane,
    survey: Survey,
    verdicts: NDArray[np.uint8],
    *,
    first_document: int,
    first_unit: int,
    size: int,
    tokenizer: str,
    work: str,
) -> LaneTask:
    """Cuts a lane into units.

    Args:
        lane: of which.
        survey: of the lane.
        verdicts: (R,) of its rows.
        first_document: the number in its source of the lane's first row.
        first_unit: the number in its source of the lane's first shard.
        size: bytes of text in a shard.
        tokenizer: names the tokenizer and engine.
        work: folder of the parts, relative to the data set's.
    """

    def unit(name: str, rows: NDArray[np.int64]) -> Unit:
        content = survey.digests[rows].tobytes() + (first_document + rows).tobytes()
        return Unit(name, rows, hashlib.sha256(tokenizer.encode() + b"\n" + content).hexdigest())

    trained = np.flatnonzero(verdicts == TRAIN)
    units = tuple(
        unit(f"{lane.source}/train-{first_unit + number:05d}.safetensors", trained[start:stop])
        for number, (start, stop) in enumerate(cut_units(survey.sizes[trained], size=size))
    )
    held_out = np.flatnonzero(verdicts == HELD_OUT)
    part = unit(f"{work}/held_out-{lane.number:05d}.safetensors", held_out) if len(held_out) else None
    return LaneTask(lane, first_document, units, part)


@dataclass
class _Open:
    """A unit that is being filled."""

    unit: Unit
    tokens: list[NDArray[np.uint32]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)


def encode_lane(
    folder: Path, source: SourceConfig, task: LaneTask, survey: Survey, tokenizer: Tokenizer, tick: Tick
) -> list[Made]:
    """Makes the shards of a lane, and its held-out part, and returns the shards.

    Raises:
        DataError: the text is not what it was in the survey, or ids are none of the tokenizer's.
    """
    made = [find_shard(folder, unit.name, unit=unit.digest) for unit in task.units]
    missing = [unit for unit, found in zip(task.units, made, strict=True) if found is None]
    if task.held_out and find_shard(folder, task.held_out.name, unit=task.held_out.digest) is None:
        missing.append(task.held_out)
    if missing:
        _write(folder, source, task, survey, tokenizer, missing, tick)
    else:
        tick(task.lane.size)
    shards = [find_shard(folder, unit.name, unit=unit.digest) for unit in task.units]
    return [shard for shard in shards if shard is not None]


def _write(
    folder: Path,
    source: SourceConfig,
    task: LaneTask,
    survey: Survey,
    tokenizer: Tokenizer,
    missing: Sequence[Unit],
    tick: Tick,
) -> None:
    wanted = np.full(len(survey.sizes), -1)
    for number, unit in enumerate(missing):
        wanted[unit.rows] = number
    open_units = [_Open(unit) for unit in missing]
    closing = np.array([tokenizer.end_of_text], np.uint32)
    row = -1
    for row, found in enumerate(rows_of(source, task.lane, tick)):
        if row >= len(wanted) or wanted[row] < 0:
            continue
        content = _checked(found, survey, row)
        into = open_units[wanted[row]]
        if isinstance(content, str):
            ids, size = tokenizer.encode_array(content), int(survey.sizes[row])
        else:
            ids = content
            if int(ids.max()) >= tokenizer.vocab_size:
                raise DataError(
                    f"{found.origin} has the id {int(ids.max())} and the tokenizer has {tokenizer.vocab_size} ids: it "
                    "is not the one that this text was encoded with; set data.tokenizer.path to that one"
                )
            size = tokenizer.bytes_of(ids)
        into.tokens.append(np.concatenate((ids, closing)))
        into.ids.append(task.first_document + row)
        into.sizes.append(size)
        into.origins.append(found.origin)
        if len(into.tokens) == len(into.unit.rows):
            _close(folder, into, tokenizer)
    if row + 1 != len(wanted):
        raise _changed(task.lane.pieces[-1].path)


def _close(folder: Path, unit: _Open, tokenizer: Tokenizer) -> None:
    write_shard(
        folder / unit.unit.name,
        unit.tokens,
        document_ids=unit.ids,
        document_bytes=unit.sizes,
        origins=unit.origins,
        vocab_size=tokenizer.vocab_size,
        unit=unit.unit.digest,
    )
    unit.tokens.clear()
    unit.origins.clear()


def _checked(row: Row, survey: Survey, number: int) -> str | NDArray[np.uint32]:
    if not isinstance(row.content, Skip):
        size, *digest = digest_of(row.content)
        if size == survey.sizes[number] and digest == survey.digests[number].tolist():
            return row.content
    raise _changed(row.origin)


def _changed(name: str) -> DataError:
    return DataError(f"{name} was changed while it was being read: run again when nothing writes to it")


def join_held_out(folder: Path, source: str, parts: Sequence[tuple[str, str]], *, size: int) -> list[Made]:
    """Joins the held-out parts of a source's lanes to shards of at least ``size`` bytes of text, but for the last.

    Args:
        folder: of the data set.
        source: of the parts.
        parts: name and digest of each, in order.
        size: bytes.
    """
    made: list[Made] = []
    held: list[tuple[str, str]] = []
    text = 0
    for number, part in enumerate(parts):
        held.append(part)
        found = find_shard(folder, part[0], unit=part[1])
        assert found is not None
        text += found[0].text_bytes
        if text >= size or number == len(parts) - 1:
            made.append(_join(folder, f"{source}/held_out-{len(made):05d}.safetensors", held))
            held, text = [], 0
    return made


def _join(folder: Path, name: str, parts: Sequence[tuple[str, str]]) -> Made:
    digest = hashlib.sha256("\n".join(digest for _, digest in parts).encode()).hexdigest()
    tokens: list[NDArray[np.uint32]] = []
    ids: list[int] = []
    sizes: list[int] = []
    origins: list[str] = []
    width = 2
    for part, _ in parts:
        arrays = safetensors.numpy.load_file(folder / part)
        width = arrays["tokens"].itemsize
        tokens += np.split(arrays["tokens"], arrays["document_ends"][:-1])
        ids += arrays["document_ids"].tolist()
        sizes += arrays["document_bytes"].tolist()
        names = arrays["origins"].tobytes()
        bounds = [0, *arrays["origin_ends"].tolist()]
        origins += [names[start:stop].decode() for start, stop in itertools.pairwise(bounds)]
    write_shard(
        folder / name,
        tokens,
        document_ids=ids,
        document_bytes=sizes,
        origins=origins,
        vocab_size=1 << 16 if width == 2 else 1 << 32,
        unit=digest,
    )
    found = find_shard(folder, name, unit=digest)
    assert found is not None
    return found
