"""Whatever ``datasets.load_dataset`` reads, local or from the hub; the only place that knows ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from k2train.config import SourceConfig
from k2train.data.errors import DataError
from k2train.data.sources.rows import Piece, Row, columns_of, row_of

ROWS = 1024  # that are turned into Python objects at a time


@lru_cache(maxsize=4)
def load(source: SourceConfig) -> Any:
    """The data set, opened once a process.

    Raises:
        DataError: it cannot be loaded, or lacks a column.
    """
    import datasets

    assert source.path  # by DataConfig.check
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(
            source.path,
            name=source.subset,
            data_files=list(source.data_files) or None,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    except Exception as error:  # of any of the libraries below it
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"datasets.load_dataset({source.path!r}, name={source.subset!r}, split={source.split!r}) failed with "
            f"{type(error).__name__} ({reason}): check the source's path, subset, split and data_files, and the network"
        ) from error
    there = loaded.column_names
    for name in columns_of(source) if there else ():
        if name not in there:
            raise DataError(
                f"the data set {source.path} has no column {name!r}: it has {', '.join(map(repr, there))}; set the "
                "source's text, origin and group to columns that are there"
            )
    return loaded


def identity(source: SourceConfig) -> str:
    """What tells one content from another: the files in the cache of ``datasets``, or what the hub says of them."""
    loaded = load(source)
    files = sorted(entry["filename"] for entry in getattr(loaded, "cache_files", []))
    checksums = sorted((loaded.info.download_checksums or {}).items(), key=str)
    return json.dumps([files, checksums, source.revision, str(loaded.info.version)], default=str)


def cut(source: SourceConfig, size: int) -> Iterator[Piece]:
    """Pieces of about ``size`` bytes; of what is streamed, the parts that can be read apart."""
    loaded, path = load(source), str(source.path)
    if source.streaming:
        for number in range(loaded.num_shards):
            yield Piece(path, path, number, number + 1, size, "")
        return
    rows = len(loaded)
    step = max(1, rows * size // max(1, loaded.data.nbytes))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield Piece(path, path, start, stop, loaded.data.nbytes * (stop - start) // rows, "")


def read(source: SourceConfig, piece: Piece) -> Iterator[Row]:
    """The rows of a piece; a row's place is its number, of what is streamed with that of its part before it."""
    loaded, columns = load(source), columns_of(source)
    if source.streaming:
        part = loaded.shard(num_shards=loaded.num_shards, index=piece.start)
        for number, values in enumerate(part):
            yield row_of(source, values, piece, f"{piece.origin}#{piece.start}.{number}")
        return
    chosen = loaded.select_columns(list(columns))
    for start in range(piece.start, piece.stop, ROWS):
        batch = chosen[start : min(start + ROWS, piece.stop)]
        for number, values in enumerate(zip(*(batch[name] for name in columns), strict=True)):
            yield row_of(source, dict(zip(columns, values, strict=True)), piece, f"{piece.origin}#{start + number}")
