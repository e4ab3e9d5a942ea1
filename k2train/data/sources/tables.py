"""Parquet and Arrow files by pyarrow: a document for each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from k2train.config import SourceConfig
from k2train.data.errors import DataError
from k2train.data.sources.listing import File
from k2train.data.sources.rows import Piece, Row, columns_of, row_of

ROWS = 1024  # that are turned into Python objects at a time


def cut_parquet(file: File, group: str, size: int) -> Iterator[Piece]:
    """Pieces of whole row groups, of about ``size`` bytes of the file."""
    parquet = _open(file.path, "Parquet")
    groups, start, held = parquet.metadata.num_row_groups, 0, 0
    for number in range(groups):
        held += parquet.metadata.row_group(number).total_byte_size
        if held >= size or number == groups - 1:
            yield Piece(file.origin, file.path, start, number + 1, held, group)
            start, held = number + 1, 0


def read_parquet(source: SourceConfig, piece: Piece) -> Iterator[Row]:
    """The rows of a piece's row groups; a row's place is its number in the file, from 0 on."""
    parquet = _open(piece.path, "Parquet")
    _check_columns(piece.path, source, parquet.schema_arrow.names)
    row = sum(parquet.metadata.row_group(number).num_rows for number in range(piece.start))
    batches = parquet.iter_batches(ROWS, row_groups=range(piece.start, piece.stop), columns=list(columns_of(source)))
    yield from _rows(source, piece, _unharmed(batches, piece.path), row)


def cut_arrow(file: File, group: str, size: int) -> Iterator[Piece]:
    """Pieces of whole record batches, of about ``size`` bytes of the file; a stream, which cannot be cut, is one."""
    table = _open(file.path, "Arrow")
    batches = getattr(table, "num_record_batches", 1)
    step = max(1, batches * size // max(1, file.size))
    for start in range(0, batches, step):
        stop = min(start + step, batches)
        yield Piece(file.origin, file.path, start, stop, file.size * (stop - start) // batches, group)


def read_arrow(source: SourceConfig, piece: Piece) -> Iterator[Row]:
    """The rows of a piece's record batches; a row's place is its number in the file, from 0 on."""
    table = _open(piece.path, "Arrow")
    _check_columns(piece.path, source, table.schema.names)
    if hasattr(table, "num_record_batches"):
        row = sum(table.get_batch(number).num_rows for number in range(piece.start))
        batches = (table.get_batch(number) for number in range(piece.start, piece.stop))
    else:
        row, batches = 0, iter(table)
    columns = list(columns_of(source))
    slices = (
        batch.select(columns).slice(start, ROWS)
        for batch in _unharmed(batches, piece.path)
        for start in range(0, batch.num_rows, ROWS)
    )
    yield from _rows(source, piece, slices, row)


def _rows(source: SourceConfig, piece: Piece, batches: Iterator[Any], row: int) -> Iterator[Row]:
    for batch in batches:
        for values in batch.to_pylist():
            yield row_of(source, values, piece, f"{piece.origin}#{row}")
            row += 1


def _open(path: str, kind: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        if kind == "Parquet":
            return pyarrow.parquet.ParquetFile(path, memory_map=True)
        mapped = pyarrow.memory_map(path)
        try:
            return pyarrow.ipc.open_file(mapped)
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            return pyarrow.ipc.open_stream(mapped)
    except (pyarrow.ArrowException, pyarrow.ArrowInvalid) as error:
        raise _damaged(path, kind, error) from error


def _unharmed(batches: Iterator[Any], path: str) -> Iterator[Any]:
    import pyarrow

    try:
        yield from batches
    except (pyarrow.ArrowException, pyarrow.ArrowInvalid, OSError) as error:
        raise _damaged(path, "table", error) from error


def _damaged(path: str, kind: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{path} is no whole {kind} file ({reason}): get a whole copy of it, or exclude it")


def _check_columns(path: str, source: SourceConfig, there: list[str]) -> None:
    for name in columns_of(source):
        if name not in there:
            raise DataError(
                f"{path} has no column {name!r}: it has {', '.join(map(repr, there))}; set the source's text, origin "
                "and group to columns that are there"
            )
