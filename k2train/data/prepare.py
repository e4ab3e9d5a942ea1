"""From files to token shards: read, split, train the tokenizer, encode, and last of all write the manifest.

The result lies in a folder of the cache that is named by everything it depends on: the settings and the listing of the
corpus (path, size and modification time of each file). Preparing the same corpus again finds the manifest there and
reads no file. A run that was stopped at any point left no manifest; the next one keeps the shards that are whole.
What comes out depends on settings and text alone, never on interruptions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from k2train.config import DataConfig
from k2train.data.errors import DataError, os_errors_explained
from k2train.data.manifest import (
    BLOCK_BYTES,
    FORMAT,
    MANIFEST_NAME,
    SPLITS,
    VERSION,
    ShardRecord,
    describe_file,
    describe_split,
    write_digests,
    write_manifest,
)
from k2train.data.shards import find_shard, write_shard
from k2train.data.source import Corpus, File, Skip, describe_skipped, find_corpus, read_text
from k2train.data.split import groups_of, held_out_groups
from k2train.data.tokenizer import Tokenizer, choose_engine, train_bpe
from k2train.paths import atomic_write

Progress = Callable[[str, int, int], None]  # stage ("wait", "read", "tokenizer", "encode"), bytes done, bytes in all

TOKENIZER_NAME = "tokenizer.json"
LOCK_NAME = "lock"
UNIT_BYTES = 32 << 20  # text that makes up one shard; a longer document is a shard of its own
TRAINING_BYTES = 128 << 20  # text that the tokenizer is trained on, at most: merges hardly change with more
CHECKED_DOCUMENTS, CHECKED_CHARACTERS = 64, 1 << 16  # on which the fast engine's ids are compared: how many, how much


@dataclass(frozen=True)
class Document:
    """A file that was read: what is needed to tell whether it is the same when it is read again."""

    number: int  # in its source
    file: File
    bytes: int
    digest: str


def prepare(config: DataConfig, *, cache: Path, progress: Progress) -> Path:
    """Makes the data set that ``config`` describes, unless the cache has it, and returns its manifest.

    Two processes that prepare the same data set do not disturb each other: the second waits and finds it done.

    Args:
        config: source, split and tokenizer.
        cache: the folder in which data sets are kept.
        progress: called with (stage, bytes done, bytes in all).

    Raises:
        DataError: no text, too little of it, or the file system refuses; one sentence with the way on.
    """
    with os_errors_explained(cache):
        corpora = {name: find_corpus(config, name, apart_from=cache) for name in sorted(config.sources)}
        folder = cache / "data" / f"{'+'.join(corpora)}-{_key(config, corpora)}"
        manifest_path = folder / MANIFEST_NAME
        if manifest_path.is_file():
            return manifest_path
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / LOCK_NAME, progress) as progress:
            if not manifest_path.is_file():
                manifest = _make(config, corpora, folder, progress)
                _remove_leftovers(folder, manifest)
                write_manifest(folder, manifest)
    return manifest_path


def _key(config: DataConfig, corpora: dict[str, Corpus]) -> str:
    """Names the result before any file is read."""
    settings = asdict(config)
    for elsewhere in ("path", "cache_dir", "weights", "max_epochs"):  # do not enter into the tokens
        del settings[elsewhere]
    listings = {
        name: {
            "root": str(corpus.root),
            "files": [(file.origin, file.size, file.mtime_ns) for file in corpus.files],
        }
        for name, corpus in corpora.items()
    }
    depends_on = {"version": VERSION, "config": settings, "sources": listings}
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def _make(config: DataConfig, corpora: dict[str, Corpus], folder: Path, progress: Progress) -> dict[str, Any]:
    documents, skipped = _read_all(corpora, progress)
    splits = {
        (name, split): part
        for name, found in documents.items()
        for split, part in _split(found, share=config.held_out).items()
    }
    training = [document for name in documents for document in splits[name, "train"]]
    definition = train_bpe(_training_texts(training, progress), vocab_size=config.tokenizer.vocab_size)
    atomic_write(folder / TOKENIZER_NAME, definition)
    sample = training[:: -(-len(training) // CHECKED_DOCUMENTS)]
    engine = choose_engine(definition, (_read_again(document)[:CHECKED_CHARACTERS] for document in sample))
    tokenizer = Tokenizer(definition, engine=engine)
    described = describe_file(folder, TOKENIZER_NAME)
    made = _encode(splits, tokenizer, f"{described['sha256']} {engine}", folder, progress)
    multiple = config.tokenizer.pad_to_multiple
    sources = {}
    for name in corpora:
        parts = {split: made[name, split] for split in SPLITS}
        digests = {split: [digest for _, digest in part] for split, part in parts.items()}
        sources[name] = {
            "digests": write_digests(folder, name, digests),
            "splits": {split: describe_split([record for record, _ in part]) for split, part in parts.items()},
        }
    return {
        "format": FORMAT,
        "version": VERSION,
        "block_bytes": BLOCK_BYTES,
        "tokenizer": described | {"engine": engine, "vocab_size": tokenizer.vocab_size},
        "padded_vocab_size": -(-tokenizer.vocab_size // multiple) * multiple,
        "sources": sources,
        "about": {
            "sources": {name: corpus.name for name, corpus in corpora.items()},
            "held_out": config.held_out,
            "skipped": {
                name: {reason.value: counts[reason] for reason in Skip if counts[reason]}
                for name, counts in skipped.items()
            },
            "asked_vocab_size": config.tokenizer.vocab_size,
        },
    }


def _read_all(
    corpora: dict[str, Corpus], progress: Progress
) -> tuple[dict[str, list[Document]], dict[str, Counter[Skip]]]:
    """Which files are documents. Exact copies are left out: one of them could land on each side of the split."""
    documents: dict[str, list[Document]] = {name: [] for name in corpora}
    skipped = {name: Counter(corpus.skipped) for name, corpus in corpora.items()}
    seen: set[str] = set()
    done, total = 0, max(1, sum(file.size for corpus in corpora.values() for file in corpus.files))
    for name, corpus in corpora.items():
        for number, file in enumerate(corpus.files):
            text = read_text(file)
            if isinstance(text, str):
                data = text.encode("utf-8")
                digest = xxhash.xxh3_128_hexdigest(data)
                if digest in seen:
                    text = Skip.COPY
                else:
                    seen.add(digest)
                    documents[name].append(Document(number, file, len(data), digest))
            if isinstance(text, Skip):
                skipped[name][text] += 1
            done += file.size
            progress("read", min(done, total), total)
        if not documents[name]:
            raise DataError(
                f"the source {name} has no text in {corpus.root}{describe_skipped(skipped[name])}: "
                f"give a folder with UTF-8 text files, or change data.sources.{name}.include"
            )
    return documents, skipped


def _split(documents: Sequence[Document], *, share: float) -> dict[str, list[Document]]:
    groups = groups_of([document.file.origin for document in documents])
    sizes: Counter[str] = Counter()
    for document, group in zip(documents, groups, strict=True):
        sizes[group] += document.bytes
    held_out = held_out_groups(sizes, share=share)
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document, group in zip(documents, groups, strict=True):
        parts["held_out" if group in held_out else "train"].append(document)
    return parts


def _training_texts(documents: Sequence[Document], progress: Progress) -> Iterator[str]:
    """What the tokenizer learns from: all text, or documents in the order of their hash up to ``TRAINING_BYTES``."""
    total = min(TRAINING_BYTES, sum(document.bytes for document in documents))
    done = 0
    for document in sorted(documents, key=lambda document: document.digest):
        if done >= total:
            return
        yield _read_again(document)
        done += document.bytes
        progress("tokenizer", min(done, total), total)


def _encode(
    splits: dict[tuple[str, str], list[Document]],
    tokenizer: Tokenizer,
    tokenizer_name: str,
    folder: Path,
    progress: Progress,
) -> dict[tuple[str, str], list[tuple[ShardRecord, NDArray[np.uint64]]]]:
    """Writes one shard a work unit, unless an interrupted run has left it whole."""
    done, total = 0, sum(document.bytes for part in splits.values() for document in part)
    made: dict[tuple[str, str], list[tuple[ShardRecord, NDArray[np.uint64]]]] = {key: [] for key in splits}
    for (source, split), documents in splits.items():
        (folder / source).mkdir(exist_ok=True)
        for number, unit in enumerate(_units(documents)):
            name = f"{source}/{split}-{number:05d}.safetensors"
            described = [tokenizer_name, *(f"{document.file.origin} {document.digest}" for document in unit)]
            unit_name = hashlib.sha256("\n".join(described).encode()).hexdigest()
            found = find_shard(folder, name, unit=unit_name)
            if found is None:
                tokens = []
                for document in unit:
                    ids = tokenizer.encode_array(_read_again(document))
                    tokens.append(np.append(ids, np.uint32(tokenizer.end_of_text)))
                    done += document.bytes
                    progress("encode", done, total)
                write_shard(
                    folder / name,
                    tokens,
                    document_ids=[document.number for document in unit],
                    document_bytes=[document.bytes for document in unit],
                    origins=[document.file.origin for document in unit],
                    vocab_size=tokenizer.vocab_size,
                    unit=unit_name,
                )
                found = find_shard(folder, name, unit=unit_name)
                assert found is not None
            else:
                done += found[0].text_bytes
                progress("encode", done, total)
            made[source, split].append(found)
    return made


def _units(documents: Sequence[Document]) -> Iterator[list[Document]]:
    unit: list[Document] = []
    size = 0
    for document in documents:
        if unit and size + document.bytes > UNIT_BYTES:
            yield unit
            unit, size = [], 0
        unit.append(document)
        size += document.bytes
    yield unit


def _read_again(document: Document) -> str:
    text = read_text(document.file)
    if isinstance(text, str) and xxhash.xxh3_128_hexdigest(text.encode("utf-8")) == document.digest:
        return text
    raise DataError(f"{document.file.path} was changed while it was being read: run again when nothing writes to it")


def _remove_leftovers(folder: Path, manifest: dict[str, Any]) -> None:
    """Removes what interrupted runs have left beside the files of the manifest."""
    kept = {LOCK_NAME, TOKENIZER_NAME}
    for source in manifest["sources"].values():
        kept.add(source["digests"]["file"])
        kept.update(file for part in source["splits"].values() for file in part["shards"]["file"])
    for path in folder.rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in kept:
            path.unlink()


@contextmanager
def _alone(path: Path, progress: Progress) -> Iterator[Progress]:
    """Holds a lock that the operating system releases when the process ends, however it ends.

    Who holds it touches its file at every progress, told by way of what this yields. Who waits tells of ``wait`` at
    each of these, and of nothing if nothing goes on there: whoever is told decides how long to wait.
    """
    with path.open("a") as file:
        seen = None
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if (touched := os.fstat(file.fileno()).st_mtime_ns) != seen:
                    progress("wait", 0, 1)
                seen = touched
                time.sleep(0.2)

        def touching(stage: str, done: int, total: int) -> None:
            os.utime(file.fileno())
            progress(stage, done, total)

        yield touching
