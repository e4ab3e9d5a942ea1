"""A prepared data set: opened, checked, and read by position.

Each split of each source is one stream of tokens: its documents in the order of the source, each closed by
end_of_text.

The *context* of a document is what its tokens may be predicted from. It begins with the end_of_text that closes the
document before, so that a document's first token is predicted from that mark alone; its own end_of_text is the last
thing predicted in it, and as an input belongs to the next document.

Legend: T tokens of a window.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from k2train.data.cache import REMOTE_NAME, CachedFolder
from k2train.data.errors import DataError, os_errors_explained
from k2train.data.manifest import SPLITS, open_digests, read_manifest
from k2train.data.reader import Files, Folder, Shards
from k2train.data.tokenizer import Tokenizer

IGNORED = -100  # the label that a loss leaves out

FIRST = np.zeros(1, dtype=np.int64)  # where the first context of a row begins

Utf8 = bytes  # by another name inside Dataset, which has a method called bytes


@dataclass(frozen=True)
class Span:
    """A piece of a document: its tokens ``start`` to ``stop``, where the last token of a document is end_of_text."""

    origin: str
    start: int
    stop: int
    shard: str  # file, relative to the data set's folder
    document: int  # its number in its source


class TokenStream:
    """The tokens of a split, over all its shards, which are opened when they are read.

    Attributes:
        starts: the position of each shard's first token in the stream; one more entry closes the last shard.
    """

    def __init__(self, *shards: Shards) -> None:
        """Takes the shards in order."""
        self._parts = shards
        self.shards = shards[0] if len(shards) == 1 else [shard for part in shards for shard in part]
        tokens = [tokens for part in shards for tokens in part.tokens]
        self.starts: list[int] = [0, *np.cumsum(tokens, dtype=np.int64).tolist()]

    def __len__(self) -> int:
        return self.starts[-1]

    def close(self, *, apart_from: Container[str]) -> None:
        """Lets go of the files that are open, but for these."""
        for part in self._parts:
            part.close(apart_from=apart_from)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens at positions ``start`` to ``stop`` of the stream, copied."""
        return self.view(start, stop).astype(np.int64) if start < stop else np.empty(0, np.int64)

    def view(self, start: int, stop: int) -> NDArray[Any]:
        """``read`` of at least one token, as they lie in their shard if that is one."""
        assert 0 <= start < stop <= self.starts[-1], (start, stop, len(self))
        index = bisect.bisect_right(self.starts, start) - 1
        offset = self.starts[index]
        if stop <= self.starts[index + 1]:  # as nearly always
            tokens: NDArray[Any] = self.shards[index].read(start - offset, stop - offset)
            return tokens
        return np.concatenate([self.shards[index].read(*part) for index, *part in self._pieces(start, stop)])

    def spans(self, start: int, stop: int) -> list[Span]:
        """The documents, or pieces of them, at positions ``start`` to ``stop``."""
        found = []
        for index, first, last in self._pieces(start, stop):
            shard = self.shards[index]
            document = int(np.searchsorted(shard.document_ends, first, side="right"))
            while first < last:
                begin = int(shard.document_ends[document - 1]) if document else 0
                end = min(last, int(shard.document_ends[document]))
                number = int(shard.document_ids[document])
                found.append(Span(shard.origin(document), first - begin, end - begin, shard.record.file, number))
                first, document = end, document + 1
        return found

    def documents_in(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(P,) the number in its source of each document, or piece of one, at these positions, and (P,) its length."""
        numbers, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for index, first, last in self._pieces(start, stop):
            shard = self.shards[index]
            begin, end = np.searchsorted(shard.document_ends, (first, last - 1), side="right")
            numbers.append(shard.document_ids[begin : end + 1])
            lengths.append(np.diff(np.minimum(shard.document_ends[begin : end + 1], last), prepend=first))
        return np.concatenate(numbers), np.concatenate(lengths)

    def context_begins(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where contexts begin (at an end_of_text) between positions ``start`` and ``stop``, counted from ``start``."""
        found = []
        for index, first, last in self._pieces(start, stop):
            ends = self.shards[index].document_ends
            inside = ends[ends.searchsorted(first, side="right") : ends.searchsorted(last, side="right")]
            found.append(inside + (self.starts[index] - start - 1))
        return found[0] if len(found) == 1 else np.concatenate([*found, np.empty(0, np.int64)])

    def document_ends(self) -> NDArray[np.int64]:
        """(D,) where each document ends in the stream; reads the lengths of all documents."""
        ends = [shard.document_ends + start for shard, start in zip(self.shards, self.starts, strict=False)]
        return np.concatenate([*ends, np.empty(0, np.int64)])

    def documents(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """(origin, token ids without the closing end_of_text) of each document."""
        for shard in self.shards:
            start = 0
            for document, end in enumerate(shard.document_ends.tolist()):
                yield shard.origin(document), shard.read(start, end - 1)
                start = end

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last): which tokens of which shards make up the range."""
        index = bisect.bisect_right(self.starts, start) - 1
        while start < stop:
            offset, end = self.starts[index], min(stop, self.starts[index + 1])
            yield index, start - offset, end - offset
            start, index = end, index + 1


def context_starts(begins: Sequence[NDArray[np.int64]], length: int) -> NDArray[np.int64]:
    """The index in its row of the first token of each token's context; the first of a row begins one in any case.

    Args:
        begins: of each row, at which tokens contexts begin, rising.
        length: T.

    Returns:
        (R, T), never falling in a row.
    """
    columns = np.concatenate([part for row in begins for part in (FIRST, row)])
    rows = np.arange(len(begins)).repeat([1 + len(row) for row in begins])
    edges = np.append(columns + rows * length, len(begins) * length)  # in all rows, one after the other
    return columns.repeat(edges[1:] - edges[:-1]).reshape(-1, length)


class Windows(Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """Windows that predict each token of a split exactly once: what bits per byte are computed from.

    The first token of all is predicted from end_of_text, so that no byte of the text goes unpredicted; the last window
    is filled up with end_of_text and labels of -100.
    """

    def __init__(self, stream: TokenStream, *, sequence_length: int, end_of_text: int) -> None:
        """Cuts the stream into ceil(tokens / T) windows."""
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length} must be at least 1")
        self._stream = stream
        self._length = sequence_length
        self._end_of_text = end_of_text

    def __len__(self) -> int:
        return -(-len(self._stream) // self._length)

    def __getitem__(self, index: Any) -> Any:
        """(tokens (T,), labels (T,), starts (T,)), int64, of window number ``index``; of each for a slice.

        ``starts`` are ``context_starts``.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start = number * self._length
        stop = min(start + self._length, len(self._stream))
        tokens = torch.full((self._length,), self._end_of_text)
        labels = torch.full((self._length,), IGNORED)
        text = torch.from_numpy(self._stream.read(start, stop))
        labels[: stop - start] = text
        tokens[1 : stop - start] = text[:-1]
        if start:
            tokens[0] = int(self._stream.read(start - 1, start)[0])
        first = max(start - 1, 0)  # tokens are the stream's from start - 1 on
        last = min(start - 1 + self._length, len(self._stream))
        begins = self._stream.context_begins(first, last) + (first - start + 1)
        return tokens, labels, torch.from_numpy(context_starts([begins], self._length)[0])


class Dataset:
    """Tokens, text and tokenizer of a prepared data set; made by ``open_dataset``.

    Attributes:
        folder: where it lies, or a part of it.
        files: gives the shards' files.
        manifest: all that ``prepare`` wrote of it; see docs/data-format.md.
        fingerprint: equal for two data sets with the same tokens in the same order under the same tokenizer.
        tokenizer: the one it was encoded with.
        padded_vocab_size: the tokenizer's size, rounded up as the config stated.
        sources: their names, sorted.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        tokenizer: Tokenizer,
        files: Files,
        shards: dict[tuple[str, str], Shards],
    ):
        """Joins what ``open_dataset`` has checked; shards by (source, split)."""
        self.folder, self.files = folder, files
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer = tokenizer
        self.padded_vocab_size: int = manifest["padded_vocab_size"]
        self.sources: tuple[str, ...] = tuple(sorted(manifest["sources"]))
        self._shards = shards

    def stream(self, split: str, source: str | None = None) -> TokenStream:
        """The tokens of ``train`` or ``held_out``: of one source, or of all of them, one after the other."""
        return TokenStream(*(self._shards[name, split] for name in self._chosen(split, source)))

    def tokens(self, split: str, source: str | None = None) -> int:
        """How many tokens the split has, the end_of_text of each document included."""
        return self._total("tokens", split, source)

    def bytes(self, split: str, source: str | None = None) -> int:
        """How many bytes of UTF-8 text the split has."""
        return self._total("text_bytes", split, source)

    def numbered(self, source: str) -> int:
        """How many documents of a source have a number, those that were left out included: at least as many."""
        left_out: dict[str, int] = self.manifest["about"]["skipped"].get(source, {})
        return sum(self._total("documents", split, source) for split in SPLITS) + sum(left_out.values())

    def documents(self, split: str, source: str | None = None) -> Iterator[tuple[str, Utf8]]:
        """(origin, text in UTF-8) of each document, decoded from its tokens."""
        for origin, tokens in self.stream(split, source).documents():
            yield origin, self.tokenizer.decode_bytes(tokens.tolist())

    def windows(self, split: str, source: str | None = None, *, sequence_length: int) -> Windows:
        """Windows that predict each token of the split once: of one source, or of all, one after the other."""
        stream = self.stream(split, source)
        return Windows(stream, sequence_length=sequence_length, end_of_text=self.tokenizer.end_of_text)

    def notes(self) -> list[str]:
        """Sentences on what turned out otherwise than asked: skipped files, a smaller vocabulary."""
        found = []
        about, vocab_size = self.manifest["about"], self.manifest["tokenizer"]["vocab_size"]
        for name in self.sources:
            if skipped := about["skipped"][name]:
                counts = ", ".join(f"{count} ({reason})" for reason, count in skipped.items())
                found.append(f"{name}: documents left out: {counts}")
        if vocab_size < about["asked_vocab_size"]:
            found.append(
                f"the vocabulary ended at {vocab_size} of {about['asked_vocab_size']} tokens, "
                "as the training text has no more pairs to merge"
            )
        return found

    def _total(self, what: str, split: str, source: str | None) -> int:
        return sum(self.manifest["sources"][name]["splits"][split][what] for name in self._chosen(split, source))

    def _chosen(self, split: str, source: str | None) -> tuple[str, ...]:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown: it must be one of {', '.join(SPLITS)}")
        if source is not None and source not in self.sources:
            raise ValueError(f"source={source!r} is unknown: it must be one of {', '.join(self.sources)}")
        return self.sources if source is None else (source,)


def open_dataset(manifest_path: Path) -> Dataset:
    """Opens what ``prepare`` made: checks manifest, tokenizer and digests; shards are checked as they are read.

    Raises:
        DataError: something is missing, damaged, edited or of another version; the sentence names the file.
    """
    folder = manifest_path.parent
    manifest = read_manifest(manifest_path)
    tokenizer_path = folder / manifest["tokenizer"]["file"]
    with os_errors_explained(tokenizer_path):
        definition = tokenizer_path.read_bytes()
    digest = hashlib.sha256(definition).hexdigest()
    if digest != manifest["tokenizer"]["sha256"]:
        raise DataError(
            f"the tokenizer {tokenizer_path} did not encode this data: its sha256 is {digest} and the manifest "
            f"says {manifest['tokenizer']['sha256']}: delete the folder {folder} and prepare the data again"
        )
    tokenizer = Tokenizer(
        definition.decode("utf-8"),
        engine=manifest["tokenizer"]["engine"],
        end_of_text=manifest["tokenizer"]["end_of_text"],
    )
    files: Files = CachedFolder(folder) if (folder / REMOTE_NAME).exists() else Folder(folder)
    shards: dict[tuple[str, str], Shards] = {}
    for source, described in manifest["sources"].items():
        digests = open_digests(folder, manifest, source)
        for split in SPLITS:
            shards[source, split] = Shards(files, described["splits"][split]["shards"], digests[split])
    return Dataset(folder, manifest, tokenizer, files, shards)
