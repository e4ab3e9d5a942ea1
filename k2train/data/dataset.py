"""A prepared data set: opened, checked, and read by position.

Each split is one stream of tokens: its documents in the order of their origins, each closed by end_of_text.

The *context* of a document is what its tokens may be predicted from. It begins with the end_of_text that closes the
document before, so that a document's first token is predicted from that mark alone; its own end_of_text is the last
thing predicted in it, and as an input belongs to the next document.

Legend: T tokens of a window.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from k2train.data.errors import DataError, os_errors_explained
from k2train.data.shards import Shard, ShardRecord, open_shard
from k2train.data.tokenizer import Tokenizer

FORMAT = "k2train-data"
VERSION = 1
SPLITS = ("train", "held_out")
IGNORED = -100  # the label that a loss leaves out

Utf8 = bytes  # by another name inside Dataset, which has a method called bytes


@dataclass(frozen=True)
class Span:
    """A piece of a document: its tokens ``start`` to ``stop``, where the last token of a document is end_of_text."""

    origin: str
    start: int
    stop: int


class TokenStream:
    """The tokens of a split, over all its shards."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Takes the shards in order."""
        self._shards = shards
        # _starts[i] is the position of shard i's first token in the stream; one more entry closes the last shard.
        self._starts = [0, *np.cumsum([len(shard.tokens) for shard in shards], dtype=np.int64).tolist()]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens at positions ``start`` to ``stop`` of the stream, copied."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        result = np.empty(stop - start, dtype=np.int64)
        for index, first, last in self._pieces(start, stop):
            offset = self._starts[index]
            result[first + offset - start : last + offset - start] = self._shards[index].tokens[first:last]
        return result

    def spans(self, start: int, stop: int) -> list[Span]:
        """The documents, or pieces of them, at positions ``start`` to ``stop``."""
        found = []
        for index, first, last in self._pieces(start, stop):
            shard = self._shards[index]
            document = int(np.searchsorted(shard.document_ends, first, side="right"))
            while first < last:
                begin = int(shard.document_ends[document - 1]) if document else 0
                end = min(last, int(shard.document_ends[document]))
                found.append(Span(shard.origin(document), first - begin, end - begin))
                first, document = end, document + 1
        return found

    def context_begins(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Whether a context begins with the token (it is an end_of_text), for positions ``start`` to ``stop``."""
        result = np.zeros(stop - start, dtype=bool)
        for index, first, last in self._pieces(start, stop):
            ends = self._shards[index].document_ends
            inside = ends[np.searchsorted(ends, first, side="right") : np.searchsorted(ends, last, side="right")]
            result[inside - 1 + self._starts[index] - start] = True
        return result

    def documents(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """(origin, token ids without the closing end_of_text) of each document."""
        for shard in self._shards:
            start = 0
            for document, end in enumerate(shard.document_ends.tolist()):
                yield shard.origin(document), shard.tokens[start : end - 1]
                start = end

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last): which tokens of which shards make up the range."""
        index = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            offset, end = self._starts[index], min(stop, self._starts[index + 1])
            yield index, start - offset, end - offset
            start, index = end, index + 1


def context_starts(begins: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The index of the first token of each token's context, where the first token of all begins one in any case.

    Args:
        begins: (T,) whether a context begins with the token.

    Returns:
        (T,), never falling.
    """
    return np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))


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
        begins = np.zeros(self._length, dtype=bool)
        first = max(start - 1, 0)  # tokens are the stream's from start - 1 on
        last = min(start - 1 + self._length, len(self._stream))
        begins[first - start + 1 : last - start + 1] = self._stream.context_begins(first, last)
        return tokens, labels, torch.from_numpy(context_starts(begins))


class Dataset:
    """Tokens, text and tokenizer of a prepared data set; made by ``open_dataset``.

    Attributes:
        folder: where it lies.
        manifest: all that ``prepare`` wrote of it; see docs/data-format.md.
        fingerprint: equal for two data sets with the same tokens in the same order under the same tokenizer.
        tokenizer: the one it was encoded with.
        padded_vocab_size: the tokenizer's size, rounded up as the config stated.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], tokenizer: Tokenizer, streams: dict[str, TokenStream]):
        """Joins what ``open_dataset`` has checked."""
        self.folder = folder
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer = tokenizer
        self.padded_vocab_size: int = manifest["padded_vocab_size"]
        self._streams = streams

    def stream(self, split: str) -> TokenStream:
        """The tokens of ``train`` or ``held_out``."""
        if split not in self._streams:
            raise ValueError(f"split={split!r} is unknown: it must be one of {', '.join(self._streams)}")
        return self._streams[split]

    def tokens(self, split: str) -> int:
        """How many tokens the split has, the end_of_text of each document included."""
        return len(self.stream(split))

    def bytes(self, split: str) -> int:
        """How many bytes of UTF-8 text the split has."""
        self.stream(split)  # refuses an unknown split
        return sum(shard["text_bytes"] for shard in self.manifest["splits"][split])

    def documents(self, split: str) -> Iterator[tuple[str, Utf8]]:
        """(origin, text in UTF-8) of each document, decoded from its tokens."""
        for origin, tokens in self.stream(split).documents():
            yield origin, self.tokenizer.decode_bytes(tokens.tolist())

    def windows(self, split: str, *, sequence_length: int) -> Windows:
        """Windows that predict each token of the split once."""
        return Windows(self.stream(split), sequence_length=sequence_length, end_of_text=self.tokenizer.end_of_text)

    def notes(self) -> list[str]:
        """Sentences on what turned out otherwise than asked: skipped files, a smaller vocabulary."""
        found = []
        tokenizer, skipped = self.manifest["tokenizer"], self.manifest["skipped"]
        if skipped:
            counts = ", ".join(f"{count} ({reason})" for reason, count in skipped.items())
            found.append(f"files left out: {counts}")
        if tokenizer["vocab_size"] < tokenizer["asked_vocab_size"]:
            found.append(
                f"the vocabulary ended at {tokenizer['vocab_size']} of {tokenizer['asked_vocab_size']} tokens, "
                "as the training text has no more pairs to merge"
            )
        return found


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """sha256 of what decides the tokens: format version, tokenizer and shards; not of how they came about."""
    decisive = {key: manifest[key] for key in ("format", "version", "tokenizer", "padded_vocab_size", "splits")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def open_dataset(manifest_path: Path) -> Dataset:
    """Opens what ``prepare`` made and checks every byte of it.

    Raises:
        DataError: something is missing, damaged, edited or of another version; the sentence names the file.
    """
    folder = manifest_path.parent
    manifest = _read_manifest(manifest_path)
    tokenizer_path = folder / manifest["tokenizer"]["file"]
    with os_errors_explained(tokenizer_path):
        definition = tokenizer_path.read_bytes()
    digest = xxhash.xxh3_64_hexdigest(definition)
    if digest != manifest["tokenizer"]["xxh3"]:
        raise DataError(
            f"the tokenizer {tokenizer_path} did not encode this data: its xxh3 is {digest} and the manifest "
            f"says {manifest['tokenizer']['xxh3']}: delete the folder {folder} and prepare the data again"
        )
    tokenizer = Tokenizer(definition.decode("utf-8"), engine=manifest["tokenizer"]["engine"])
    streams = {
        split: TokenStream([open_shard(folder, ShardRecord(**record)) for record in manifest["splits"][split]])
        for split in SPLITS
    }
    return Dataset(folder, manifest, tokenizer, streams)


def _read_manifest(path: Path) -> dict[str, Any]:
    remedy = f"delete the folder {path.parent} and prepare the data again"
    with os_errors_explained(path):
        if not path.is_file():
            raise DataError(f"there is no prepared data at {path}: prepare it first")
        data = path.read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(data)
        kind = (manifest["format"], manifest["version"])
        said, computed = manifest["fingerprint"], fingerprint_of(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the manifest {path} is damaged ({error!r}): {remedy}") from error
    if kind != (FORMAT, VERSION):
        raise DataError(
            f"{path} is {kind[0]} version {kind[1]}; this program reads {FORMAT} version {VERSION}: {remedy}"
        )
    if said != computed:
        raise DataError(f"the manifest {path} was changed after it was written: its fingerprint does not fit: {remedy}")
    return manifest
