"""Documents that a run no longer learns from: their tokens are still read, and predicted no more.

From a sample on, the labels of these documents' tokens are those that the loss leaves out. Which tokens a sample has,
and every other sample, stays as it was; and so does the past.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from k2train.config import DropConfig
from k2train.data.errors import DataError, os_errors_explained

NAME = re.compile(r"(.+)/(\d+)")  # source/number, as ``k2train data trace`` shows it


class Drops:
    """The documents that are dropped, and from which sample on.

    Attributes:
        begin: the first sample of which any are; infinity if there is none.
    """

    def __init__(self, drops: Sequence[DropConfig], *, documents: Mapping[str, int]) -> None:
        """Reads the lists.

        Args:
            drops: as configured.
            documents: how many each of the data set's sources has.

        Raises:
            DataError: a file cannot be read; a name is not that of a document.
        """
        self._from: list[int] = []
        self._documents: list[dict[str, NDArray[np.int64]]] = []
        self._digests: list[str] = []
        for drop in drops:
            names = sorted({*drop.documents, *_listed(drop.file)})
            numbers: dict[str, list[int]] = {}
            for name in names:
                match = NAME.fullmatch(name)
                if not match or match[1] not in documents:
                    raise DataError(
                        f"data.order.drops: {name!r} is no document: give source/number, as k2train data trace shows "
                        f"it, of one of the sources {', '.join(documents)}"
                    )
                if int(match[2]) >= documents[match[1]]:
                    raise DataError(
                        f"data.order.drops: {name!r} is no document: those of {match[1]} are numbered from 0 to "
                        f"{documents[match[1]] - 1}; k2train data trace shows their names"
                    )
                numbers.setdefault(match[1], []).append(int(match[2]))
            self._from.append(drop.from_sample)
            self._documents.append({source: np.array(found) for source, found in numbers.items()})
            self._digests.append(xxhash.xxh3_64_hexdigest("\n".join(names).encode()))

        self.begin = min(self._from, default=math.inf)

    def at(self, number: int, source: str) -> NDArray[np.int64] | None:
        """The documents of a source, by number, that are dropped in a sample; None if there are none."""
        found = [
            documents[source]
            for first, documents in zip(self._from, self._documents, strict=True)
            if first <= number and source in documents
        ]
        return np.concatenate(found) if found else None

    def before(self, next_sample: int) -> list[list[int | str]]:
        """[first sample, xxh3 of the documents' names] of what has been dropped before a sample."""
        pairs = zip(self._from, self._digests, strict=True)
        return sorted([first, digest] for first, digest in pairs if first < next_sample)


def _listed(file: str | None) -> Iterable[str]:
    if file is None:
        return []
    path = Path(file).expanduser()
    with os_errors_explained(path):
        return path.read_text(encoding="utf-8").split()
