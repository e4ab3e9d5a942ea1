"""Sources of a person's own: a class that ``data.sources.NAME.kind`` names by its dotted path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from k2train.config import OwnPart, SourceConfig, explain, own_part
from k2train.data.errors import DataError
from k2train.data.sources.listing import Corpus, File
from k2train.data.sources.rows import Piece, Row, row_of


@runtime_checkable
class Source(Protocol):
    """What a source of one's own has; ``options`` go to its constructor, in every process that reads.

    It is read twice, in parts, by several processes: whatever it gives, it must give again.
    """

    def parts(self) -> Iterable[str]:
        """What can be read apart, taken in sorted order: paths of files, or any other names.

        A file is known by its path, size and modification time: one that has changed is prepared anew. Whatever else
        it is must have its version in its name, as ``orders@2026-05-01``.
        """

    def read(self, part: str) -> Iterable[Mapping[str, Any]]:
        """The documents of a part, in order: columns, of which ``text`` is the document unless the config names others.

        As for a table, ``text``, ``origin``, ``group`` and the filters of the source's config apply to them.
        """


def find(source: SourceConfig, name: str) -> Corpus:
    """The parts of a source, none of them read.

    Raises:
        ConfigError: there is no such class, or it cannot be constructed.
        DataError: it has no parts, or fails to name them.
    """
    part = _find(source, f"data.sources.{name}.kind")
    made = part.make()
    with _explained(source.kind, "parts()"):
        names = list(made.parts())
    if not names or len(set(names)) < len(names) or not all(isinstance(each, str) for each in names):
        found = "none" if not names else "one twice, or one that is no text"
        raise DataError(f"{source.kind}.parts() gives {found}: it must give the names of what can be read, each once")
    return Corpus(part.identity, part.identity, tuple(map(_listed, sorted(names))), Counter())


def cut(corpus: Corpus, size: int) -> Iterator[Piece]:
    """A piece for each part; one that is no file counts as ``size`` bytes."""
    for file in corpus.files:
        yield Piece(file.origin, file.path, 0, 1, file.size if file.mtime_ns else size, "")


def read(source: SourceConfig, piece: Piece) -> Iterator[Row]:
    """The documents of a part; a document's place is its number in it, from 0 on."""
    made = _find(source, "data.sources.*.kind").make()
    call = f"read({piece.path!r})"
    with _explained(source.kind, call):
        for number, values in enumerate(made.read(piece.path)):
            if not isinstance(values, Mapping):
                raise DataError(
                    f"{source.kind}.{call} gives {type(values).__name__}: it must give mappings of columns, as "
                    '{"text": ...}'
                )
            yield row_of(source, values, piece, f"{piece.origin}#{number}")


def _find(source: SourceConfig, key: str) -> OwnPart:
    return own_part(key, source.kind, source.options, base=Source)


def _listed(name: str) -> File:
    path = Path(name)
    if not path.is_file():
        return File(name, name, 0, 0)
    status = path.stat()
    return File(name, name, status.st_size, status.st_mtime_ns)


@contextmanager
def _explained(kind: str, call: str) -> Iterator[None]:
    """Turns what a person's code raises into a DataError with the line of that code."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # any that there is
        raise DataError(f"{kind}.{call} failed: {explain(error)}") from error
