"""A data set that is not there: as large as a run needs, with places for its samples and nothing to read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from k2train.config import DataConfig
from k2train.data import Dataset, Tokenizer
from k2train.data.manifest import SPLITS, ShardRecord, describe_split
from k2train.data.reader import Folder, Shards
from k2train.data.tokenizer import define

SHARDS = 1000  # of a source
TOKEN_BYTES = 4


def stand_in(config: DataConfig, *, tokens: int) -> Dataset:
    """The data set; each source could feed the whole run without beginning anew.

    Args:
        config: whose sources it has; one where none are named.
        tokens: of the run.
    """
    names = sorted(config.sources) or ["text"]
    splits = dict(zip(SPLITS, (describe_split(list(_records(tokens + 1))), describe_split([])), strict=True))
    manifest: dict[str, Any] = {
        "fingerprint": "",
        "padded_vocab_size": 0,
        "sources": {name: {"splits": splits} for name in names},
        "about": {"skipped": {name: {} for name in names}},
    }
    plain = replace(config.tokenizer, kind="bytes", path=None)
    tokenizer = Tokenizer(define(plain, []), engine="tokenizers", end_of_text=plain.end_of_text)
    files, none = Folder(Path()), np.empty(0, np.uint64)
    shards = {(name, split): Shards(files, splits[split]["shards"], none) for name in names for split in SPLITS}
    return Dataset(Path(), manifest, tokenizer, files, shards)


def _records(tokens: int) -> Iterable[ShardRecord]:
    """Shards of as many tokens, one more in the first of them."""
    each, more = divmod(tokens, SHARDS)
    for number in range(min(SHARDS, tokens)):
        size = each + (number < more)
        yield ShardRecord(f"{number:05}", size * TOKEN_BYTES, "", size, size, size * TOKEN_BYTES)
