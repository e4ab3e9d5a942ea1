"""What readers have in common: pieces of a source, the rows they give, columns, groups and filters."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from k2train.config import SourceConfig
from k2train.data.errors import DataError
from k2train.data.sources.listing import Skip


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read in one go.

    ``start`` and ``stop`` count what the kind can seek to: bytes, row groups, rows or tokens.
    """

    origin: str  # of the file
    path: str
    start: int
    stop: int
    size: int  # bytes that are read, about
    group: str  # the directory's; rows may have groups of their own


class Row(NamedTuple):
    """A document, or why it is none. Of what was tokenized elsewhere the content is ids, without end_of_text."""

    content: str | NDArray[np.uint32] | Skip
    origin: str
    group: str


def columns_of(source: SourceConfig) -> tuple[str, ...]:
    """The columns that a source's rows are made of, each once."""
    names = template_columns(source.text) if "{" in source.text else (source.text,)
    extra = [source.origin] if source.origin else []
    if source.group not in (None, "directory", "document"):
        assert source.group
        extra.append(source.group)
    return tuple(dict.fromkeys((*names, *extra)))


@lru_cache
def template_columns(template: str) -> tuple[str, ...]:
    """The columns that ``{title}: {text}`` names."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(template) if name)


def row_of(source: SourceConfig, values: Mapping[str, Any], piece: Piece, place: str) -> Row:
    """A row of a table as a document.

    Args:
        source: says which columns make up text, origin and group.
        values: of these columns.
        piece: that the row is of.
        place: of the row, for messages; the origin, unless a column has it.

    Raises:
        DataError: a column is missing or is no text.
    """
    for name in columns_of(source):
        if name not in values:
            raise DataError(
                f"{place} has no column {name!r}: it has {', '.join(map(repr, values)) or 'none'}; set the source's "
                "text, origin and group to columns that are there"
            )
    origin = str(values[source.origin]) if source.origin else place
    group = {"directory": piece.group, "document": origin, None: origin}.get(source.group)
    if group is None:
        group = str(values[str(source.group)])
    parts = {name: values[name] for name in columns_of(source) if name not in (source.origin, source.group)}
    for name in template_columns(source.text) if "{" in source.text else (source.text,):
        if values[name] is None:
            return Row(Skip.EMPTY, origin, group)
        if not isinstance(values[name], str):
            raise DataError(
                f"{place}: column {name!r} holds {type(values[name]).__name__}, not text: set the source's text to a "
                "column of text"
            )
        parts[name] = values[name]
    text = source.text.format(**parts) if "{" in source.text else parts[source.text]
    return Row(text, origin, group)


def filtered(source: SourceConfig, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, those that the source's filters drop with the reason in place of the text."""
    match = [re.compile(pattern) for pattern in source.match]
    reject = [re.compile(pattern) for pattern in source.reject]
    least, most = source.min_characters or 1, source.max_characters
    for row in rows:
        if not isinstance(row.content, str):
            yield row
            continue
        text = row.content
        skip = None
        if not text:
            skip = Skip.EMPTY
        elif not _is_utf8(text):
            skip = Skip.NOT_UTF8
        elif len(text) < least:
            skip = Skip.SHORT
        elif most is not None and len(text) > most:
            skip = Skip.LONG
        elif not all(pattern.search(text) for pattern in match):
            skip = Skip.UNMATCHED
        elif any(pattern.search(text) for pattern in reject):
            skip = Skip.REJECTED
        yield row if skip is None else row._replace(content=skip)


def _is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8; JSON may spell lone surrogates, which cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
