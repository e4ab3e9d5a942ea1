"""The knobs of the data: sources, tokenizer, and the order of training samples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from k2train.config.rules import is_own, rule


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A byte-level BPE that all sources share."""

    kind: str = rule(one_of=("bpe", "json", "tiktoken", "bytes"))  # trained | tokenizer.json | ranks file | bytes alone
    path: str | None = rule()  # json, tiktoken: the file
    vocab_size: int = rule(at_least=257, at_most=163840)  # bpe: tokens including the 256 bytes and the special tokens
    split: str = rule(one_of=("gpt4", "kimi-k2"))  # bpe, tiktoken: how text is cut before merging
    end_of_text: str = rule()  # the special token that closes a document
    pad_to_multiple: int = rule(at_least=1)  # the model's vocabulary is rounded up to a multiple of this

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        reads = self.kind in ("json", "tiktoken")
        if reads and not self.path:
            yield f"path is missing: kind={self.kind} needs the file, as in data.tokenizer.path=/home/me/tokenizer.json"
        if not reads and self.path:
            yield f"path={self.path!r} is given but kind={self.kind} reads no file: set kind=json or kind=tiktoken"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents; see configs/data/mixture.yaml for what its keys mean."""

    kind: str = rule(one_of=("stdlib", "folder", "jsonl", "parquet", "arrow", "datasets", "megatron", "raw"), own=True)
    options: dict[str, Any] | None = rule(default=None)  # of one's own: for its constructor
    path: str | None = rule(default=None)  # file or folder; datasets: what load_dataset takes; null: data.path
    include: tuple[str, ...] | None = rule(default=None)  # fnmatch on the path in the folder; null: the kind's endings
    exclude: tuple[str, ...] = rule(default=())
    text: str = rule(default="text")  # a column, or a template of several: "{title}\n{text}"
    origin: str | None = rule(default=None)  # a column that says where a document comes from; null: file and place
    # What is held out as a whole: directory, document or a column. null: a file's directory, a table's row
    group: str | None = rule(default=None)
    min_characters: int | None = rule(default=None, at_least=1)
    max_characters: int | None = rule(default=None, at_least=1)
    match: tuple[str, ...] = rule(default=())  # regular expressions, each of which a document must have a match of
    reject: tuple[str, ...] = rule(default=())  # regular expressions, none of which it may have a match of
    subset: str | None = rule(default=None)  # datasets: its configuration's name
    split: str = rule(default="train")  # datasets
    revision: str | None = rule(default=None)  # datasets: of the hub's repository
    data_files: tuple[str, ...] = rule(default=())  # datasets: local or remote files for path=json, csv, ...
    streaming: bool = rule(default=False)  # datasets: read without a copy in the cache of datasets
    separator: int | None = rule(default=None, at_least=0)  # raw, megatron: the id that stands between documents
    dtype: str = rule(default="uint16", one_of=("uint16", "uint32"))  # raw: of the ids

    @property
    def own(self) -> bool:
        """Whether it is a person's own."""
        return is_own(self.kind)

    @property
    def finds_itself(self) -> bool:
        """Whether it needs no path."""
        return self.kind == "stdlib" or self.own

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        if self.kind == "raw" and self.separator is None:
            yield "separator is missing: kind=raw needs the id that stands between documents (GPT-2: 50256)"
        if self.own and (self.include or self.exclude):
            yield f"include or exclude is given but kind={self.kind} finds its parts itself: give it options for that"
        if self.options and not self.own:
            yield f"options is given but kind={self.kind} is not your own: its keys stand beside kind"
        for key in ("match", "reject"):
            for pattern in getattr(self, key):
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield f"{key}: {pattern!r} is no regular expression ({error})"


@dataclass(frozen=True, kw_only=True)
class DropConfig:
    """Documents whose tokens are predicted no more from a sample on; see docs/data-order.md."""

    from_sample: int = rule(at_least=0)
    documents: tuple[str, ...] = rule(default=())  # source/number, as k2train data trace shows it
    file: str | None = rule(default=None)  # of such names, one on a line

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        if not self.documents and self.file is None:
            yield "documents is missing: name them, as in documents=[web/17], or give a file of such names"


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """What training samples are, and in which order they come; see docs/data-order.md."""

    packing: bool = rule()  # whole documents in windows; false: cut wherever a window ends
    group_shards: int | None = rule(at_least=1)  # shards whose windows are mixed with each other; null: all
    skips: tuple[tuple[int, int], ...] = rule(at_least=0)  # first and last of the samples that are left out
    drops: tuple[DropConfig, ...] = rule()  # documents that are predicted no more from a sample on


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from, how it is split and encoded, and how its sources are mixed."""

    sources: dict[str, SourceConfig] = rule()
    path: str | None = rule()  # of the sources that give none of their own
    # Relative sampling weights: a number, or pairs [training tokens, weight] with straight lines between them. Without
    # any each source has the weight of its size.
    weights: dict[str, float | tuple[tuple[float, float], ...]] = rule(at_least=0)
    max_epochs: dict[str, float] = rule(above=0)  # how often a source may be seen; one that is not named has no limit
    order: OrderConfig = rule()
    prepared: str | None = rule()  # folder or URL of a data set that prepare has made elsewhere; null: it is made here
    cache_bytes: int | None = rule(at_least=1)  # of the shards behind a URL that are kept here; null: all
    dedup: str = rule(
        one_of=("none", "exact", "near")
    )  # over all sources: keeps the first of equal, or alike, documents
    near_threshold: float = rule(above=0, below=1)  # near: the share of common 5-word sequences (Jaccard), estimated
    held_out: float = rule(above=0, below=1)  # share of each source's bytes kept for validation, by hash of the group
    cache_dir: str | None = rule()  # null: $XDG_CACHE_HOME/k2train
    workers: int | None = rule(at_least=1)  # processes that prepare; null: the cores
    shard_bytes: int = rule(at_least=1)  # of text in a shard, about: what a process holds and writes at a time
    tokenizer: TokenizerConfig = rule()

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        if self.prepared:
            return
        if self.cache_bytes is not None:
            yield f"cache_bytes={self.cache_bytes} is given but nothing reads it without prepared: set it to null"
        if not self.sources:
            yield "sources is empty: name at least one, or use data=stdlib"
        for name, source in self.sources.items():
            if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
                yield f"sources.{name}: the name becomes a folder's: use letters, digits, - and _ alone"
            if not source.finds_itself and not (source.path or self.path):
                yield (
                    f"path is missing: the source {name} of kind {source.kind} needs one, as in "
                    f"data.path=/home/me/code or data.sources.{name}.path=/home/me/code"
                )
            if source.finds_itself and source.path:
                yield f"sources.{name}.path={source.path!r} is given but kind={source.kind} does not read it: remove it"
        if self.path and all(source.path or source.finds_itself for source in self.sources.values()):
            yield f"path={self.path!r} is given but no source reads it: add data=folder to train on it"
        for key, given in (("weights", self.weights), ("max_epochs", self.max_epochs)):
            for name in sorted(given.keys() - self.sources.keys()):
                yield f"{key}.{name}: there is no such source: the sources are {', '.join(sorted(self.sources))}"
        if self.tokenizer.kind in ("bpe", "bytes"):
            for name, source in self.sources.items():
                if source.kind in ("megatron", "raw"):
                    yield (
                        f"sources.{name}.kind={source.kind} holds ids of a tokenizer that is there already: give it by "
                        "data.tokenizer.kind=json data.tokenizer.path=tokenizer.json"
                    )
        if self.weights:
            for name in sorted(self.sources.keys() - self.weights.keys()):
                yield f"weights.{name} is missing: give a weight to each source, or to none"
