"""Files of text, each a document, and files of JSON lines; compressed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import orjson

from k2train.config import SourceConfig
from k2train.data.errors import DataError
from k2train.data.sources.listing import COMPRESSED, UNREADABLE, File, Skip
from k2train.data.sources.rows import Piece, Row, row_of


def open_file(path: str) -> IO[bytes]:
    """Opens a file for reading, through the decompressor that its ending asks for."""
    if path.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.endswith(".bz2"):
        return cast(IO[bytes], bz2.open(path, "rb"))
    if path.endswith(".xz"):
        return cast(IO[bytes], lzma.open(path, "rb"))
    if path.endswith(".zst"):
        import pyarrow  # its stream tells a file that was cut short, which zstandard's does not

        return cast(IO[bytes], io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20))
    return Path(path).open("rb", buffering=1 << 20)  # lines are often longer than the default of 8 KiB


@contextmanager
def damage_explained(path: str) -> Iterator[None]:
    """Turns what decompressors raise on a damaged file into a DataError."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is not None:  # the file system's, not the decompressor's
            raise
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} cannot be decompressed to its end ({reason}): get a whole copy of it, or exclude it")


def read_text(path: str) -> str | Skip:
    """A file's text, exactly (line ends and a byte order mark stay), or why it is no document.

    Files that are not UTF-8 are left out, not repaired: replacement characters would be trained on, and the bytes of a
    document would no longer be those of the file.
    """
    try:
        with damage_explained(path), open_file(path) as file:
            data = file.read()
    except OSError as error:
        if error.errno in UNREADABLE:
            return Skip.UNREADABLE
        raise
    if b"\0" in data:
        return Skip.BINARY
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return Skip.NOT_UTF8


def read_file(source: SourceConfig, piece: Piece) -> Iterator[Row]:
    """The one document of a file of text."""
    group = piece.origin if source.group == "document" else piece.group
    yield Row(read_text(piece.path), piece.origin, group)


def cut_lines(file: File, group: str, size: int) -> Iterator[Piece]:
    """Pieces of a file of lines: of about ``size`` bytes, or the whole file if it is compressed."""
    step = max(1, file.size) if file.path.endswith(COMPRESSED) else size
    for start in range(0, max(1, file.size), step):
        stop = min(start + step, file.size)
        yield Piece(file.origin, file.path, start, stop, stop - start, group)


def read_lines(source: SourceConfig, piece: Piece) -> Iterator[Row]:
    """A document for each line of JSON that begins in the piece; its place is the byte at which the line begins.

    Lines that are not UTF-8 are left out; a line that is no JSON object is an error, as a file that was cut short is.
    """
    compressed = piece.path.endswith(COMPRESSED)
    with damage_explained(piece.path), open_file(piece.path) as file:
        position = 0
        if piece.start:
            file.seek(piece.start - 1)
            position = piece.start - 1 + len(file.readline())  # the line that began before belongs to the piece before
        while compressed or position < piece.stop:
            line = file.readline()
            if not line:
                return
            place, position = f"{piece.origin}@{position}", position + len(line)
            if not line.strip():
                continue
            try:
                values = _parsed(line)
            except UnicodeDecodeError:
                yield Row(Skip.NOT_UTF8, place, piece.group if source.group == "directory" else place)
                continue
            except ValueError as error:
                values = error
            if not isinstance(values, dict):
                raise DataError(
                    f"{piece.path} has no JSON object in the line at byte {position - len(line)} "
                    f"({values if isinstance(values, ValueError) else type(values).__name__}): it may have been cut "
                    "short; mend or exclude the file"
                )
            yield row_of(source, values, piece, place)


def _parsed(line: bytes) -> Any:
    """A line of JSON, as ``json`` reads it; what ``orjson`` will not (NaN, lone surrogates) is left to ``json``."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)
