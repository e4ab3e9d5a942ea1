"""Where documents come from: a listing of a source, its pieces, and the rows of a piece.

``find_corpus`` tells what there is without reading it, ``cut_pieces`` cuts it into parts of about equal size, and
``read_rows`` reads a part, one document at a time. All of it depends on the source alone, never on who reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from k2train.config import DataConfig, SourceConfig
from k2train.data.sources import files, hub, own, tables, tokenized
from k2train.data.sources.groups import groups_of
from k2train.data.sources.listing import Corpus, File, Skip, describe_skipped, list_corpus
from k2train.data.sources.rows import Piece, Row, filtered

__all__ = [
    "Corpus",
    "File",
    "Piece",
    "Row",
    "Skip",
    "cut_pieces",
    "describe_skipped",
    "find_corpus",
    "located",
    "read_rows",
]

READERS: dict[str, Callable[[SourceConfig, Piece], Iterator[Row]]] = {
    "stdlib": files.read_file,
    "folder": files.read_file,
    "jsonl": files.read_lines,
    "parquet": tables.read_parquet,
    "arrow": tables.read_arrow,
    "datasets": hub.read,
    "megatron": tokenized.read_megatron,
    "raw": tokenized.read_raw,
}
CUTTERS: dict[str, Callable[[File, str, int], Iterator[Piece]]] = {
    "jsonl": files.cut_lines,
    "parquet": tables.cut_parquet,
    "arrow": tables.cut_arrow,
    "megatron": tokenized.cut_megatron,
}


def located(config: DataConfig) -> dict[str, SourceConfig]:
    """The sources by name, sorted, each with its own path or that of the data set."""
    return {
        name: source if source.finds_itself else replace(source, path=source.path or config.path)
        for name, source in sorted(config.sources.items())
    }


def find_corpus(source: SourceConfig, name: str, *, apart_from: Path) -> Corpus:
    """What a source is made of, without reading it.

    Args:
        source: as ``located`` gives it.
        name: of the source, for messages.
        apart_from: a folder that is never entered.

    Raises:
        DataError: there is nothing, or it cannot be listed.
        ConfigError: it is a person's own, and cannot be found or constructed.
    """
    if source.own:
        return own.find(source, name)
    if source.kind == "datasets":
        return Corpus(f"datasets: {source.path}", hub.identity(source), (), Counter())
    return list_corpus(source, name, apart_from=apart_from)


def cut_pieces(source: SourceConfig, corpus: Corpus, *, size: int) -> Iterator[Piece]:
    """The source in parts of about ``size`` bytes, or of a file if that is less, in order."""
    if source.kind == "datasets":
        yield from hub.cut(source, size)
        return
    if source.own:
        yield from own.cut(corpus, size)
        return
    groups = groups_of([file.origin for file in corpus.files])
    for file, group in zip(corpus.files, groups, strict=True):
        if source.kind == "raw":
            yield from tokenized.cut_raw(file, group, size, source.dtype)
        elif source.kind in CUTTERS:
            yield from CUTTERS[source.kind](file, group, size)
        else:
            yield Piece(file.origin, file.path, 0, 1, file.size, group)


def read_rows(source: SourceConfig, piece: Piece) -> Iterator[Row]:
    """The documents of a piece, and what is none."""
    read = own.read if source.own else READERS[source.kind]
    return filtered(source, read(source, piece))
