"""``k2train prepare``: the data of a run, without the run."""

from __future__ import annotations

import sys

from k2train.cli.progress import PrepareProgress
from k2train.config import RunConfig
from k2train.data import DataError, open_dataset, prepare
from k2train.paths import cache_dir
from k2train.units import count


def run(config: RunConfig) -> int:
    """Prepares what ``config`` would train on and says what it is; returns the exit status."""
    try:
        with PrepareProgress(sys.stdout) as progress:
            manifest = prepare(config.data, cache=cache_dir(config.data.cache_dir), progress=progress)
        dataset = open_dataset(manifest)
    except DataError as error:
        print(f"k2train: error: {error}", file=sys.stderr)
        return 1
    for split in ("train", "held_out"):
        tokens, size = dataset.tokens(split), dataset.bytes(split)
        print(f"{split.replace('_', ' ')}: {count(tokens)} tokens of {count(size)} bytes")
    for name in dataset.sources:
        weight, limit = config.data.weights.get(name), config.data.max_epochs.get(name)
        sampled = "by its size" if weight is None else f"with weight {weight}"
        seen = "" if limit is None else f", at most {limit:g} times"
        print(f"source {name}: {count(dataset.tokens('train', name))} training tokens, sampled {sampled}{seen}")
    for note in dataset.notes():
        print(note)
    print(f"vocabulary: {dataset.tokenizer.vocab_size} tokens")
    print(f"data: {manifest.parent}")
    return 0
