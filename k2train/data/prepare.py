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
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from k2train.config import DataConfig
from k2train.data.dataset import FORMAT, SPLITS, VERSION, fingerprint_of
from k2train.data.errors import DataError, os_errors_explained
from k2train.data.shards import ShardRecord, find_shard, write_shard
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
        corpus = find_corpus(config, apart_from=cache)
        folder = cache / "data" / f"{config.source}-{_key(config, corpus)}"
        manifest_path = folder / "manifest.json"
        if manifest_path.is_file():
            return manifest_path
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / LOCK_NAME, progress):
            if not manifest_path.is_file():
                manifest = _make(config, corpus, folder, progress)
                _remove_leftovers(folder, manifest)
                atomic_write(manifest_path, json.dumps(manifest, indent=1) + "\n")
    return manifest_path


def _key(config: DataConfig, corpus: Corpus) -> str:
    """Names the result before any file is read."""
    depends_on = {
        "version": VERSION,
        "config": {key: value for key, value in asdict(config).items() if key not in ("path", "cache_dir")},
        "root": str(corpus.root),
        "files": [(file.origin, file.size, file.mtime_ns) for file in corpus.files],
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def _make(config: DataConfig, corpus: Corpus, folder: Path, progress: Progress) -> dict[str, Any]:
    documents, skipped = _read_all(corpus, progress)
    splits = _split(documents, share=config.held_out)
    definition = train_bpe(_training_texts(splits["train"], progress), vocab_size=config.tokenizer.vocab_size)
    atomic_write(folder / TOKENIZER_NAME, definition)
    sample = splits["train"][:: -(-len(splits["train"]) // CHECKED_DOCUMENTS)]
    engine = choose_engine(definition, (_read_again(document)[:CHECKED_CHARACTERS] for document in sample))
    tokenizer = Tokenizer(definition, engine=engine)
    tokenizer_digest = xxhash.xxh3_64_hexdigest(definition.encode())
    shards = _encode(splits, tokenizer, f"{tokenizer_digest} {engine}", folder, progress)
    multiple = config.tokenizer.pad_to_multiple
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "source": {"kind": config.source, "name": corpus.name},
        "held_out": config.held_out,
        "skipped": {reason.value: skipped[reason] for reason in Skip if skipped[reason]},
        "tokenizer": {
            "file": TOKENIZER_NAME,
            "xxh3": tokenizer_digest,
            "engine": engine,
            "vocab_size": tokenizer.vocab_size,
            "asked_vocab_size": config.tokenizer.vocab_size,
        },
        "padded_vocab_size": -(-tokenizer.vocab_size // multiple) * multiple,
        "splits": {split: [asdict(record) for record in records] for split, records in shards.items()},
    }
    return manifest | {"fingerprint": fingerprint_of(manifest)}


def _read_all(corpus: Corpus, progress: Progress) -> tuple[list[Document], Counter[Skip]]:
    """Which files are documents. Exact copies are left out: one of them could land on each side of the split."""
    documents: list[Document] = []
    skipped = Counter(corpus.skipped)
    seen: set[str] = set()
    done, total = 0, max(1, sum(file.size for file in corpus.files))
    for file in corpus.files:
        text = read_text(file)
        if isinstance(text, str):
            data = text.encode("utf-8")
            digest = xxhash.xxh3_128_hexdigest(data)
            if digest in seen:
                text = Skip.COPY
            else:
                seen.add(digest)
                documents.append(Document(file, len(data), digest))
        if isinstance(text, Skip):
            skipped[text] += 1
        done += file.size
        progress("read", min(done, total), total)
    if not documents:
        raise DataError(
            f"{corpus.root} has no text{describe_skipped(skipped)}: "
            "give a folder with UTF-8 text files, or change data.include"
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
    splits: dict[str, list[Document]], tokenizer: Tokenizer, tokenizer_name: str, folder: Path, progress: Progress
) -> dict[str, list[ShardRecord]]:
    """Writes one shard a work unit, unless an interrupted run has left it whole."""
    done, total = 0, sum(document.bytes for part in splits.values() for document in part)
    records: dict[str, list[ShardRecord]] = {split: [] for split in splits}
    for split, documents in splits.items():
        for number, unit in enumerate(_units(documents)):
            path = folder / f"{split}-{number:05d}.safetensors"
            described = [tokenizer_name, *(f"{document.file.origin} {document.digest}" for document in unit)]
            name = hashlib.sha256("\n".join(described).encode()).hexdigest()
            record = find_shard(path, unit=name)
            if record is None:
                tokens = []
                for document in unit:
                    ids = tokenizer.encode_array(_read_again(document))
                    tokens.append(np.append(ids, np.uint32(tokenizer.end_of_text)))
                    done += document.bytes
                    progress("encode", done, total)
                record = write_shard(
                    path,
                    tokens,
                    document_bytes=[document.bytes for document in unit],
                    origins=[document.file.origin for document in unit],
                    vocab_size=tokenizer.vocab_size,
                    unit=name,
                )
            else:
                done += record.text_bytes
                progress("encode", done, total)
            records[split].append(record)
    return records


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
    kept = {LOCK_NAME, TOKENIZER_NAME} | {shard["file"] for part in manifest["splits"].values() for shard in part}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


@contextmanager
def _alone(path: Path, progress: Progress) -> Iterator[None]:
    """Holds a lock that the operating system releases when the process ends, however it ends."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress("wait", 0, 1)
                time.sleep(0.2)
        yield
