"""``k2train prepare``: the data of a run, without the run."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from k2train.cli.progress import PrepareProgress
from k2train.config import DataConfig, RunConfig
from k2train.data import Dataset, open_dataset, prepare
from k2train.paths import cache_dir
from k2train.units import count

PIPED_WIDTH = 120  # columns where the terminal does not say


def run(config: RunConfig) -> int:
    """Prepares what ``config`` would train on and says what it is; returns the exit status."""
    dataset = prepared(config.data)
    console_for_tables().print(totals(dataset, config.data))
    for note in dataset.notes():
        print(note)
    print(f"vocabulary: {dataset.tokenizer.vocab_size} tokens")
    print(f"data: {dataset.folder}")
    return 0


def prepared(config: DataConfig) -> Dataset:
    """The data set, made if need be before the person's eyes.

    Raises:
        DataError: it cannot be made or opened.
    """
    with PrepareProgress(sys.stdout) as progress:
        manifest = prepare(config, cache=cache_dir(config.cache_dir), progress=progress)
    return open_dataset(manifest)


def console_for_tables() -> Console:
    """Standard output, wide enough for a table where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPED_WIDTH)


def totals(dataset: Dataset, config: DataConfig) -> Table:
    """A line for each split of each source, and one for all of it."""
    table = Table(box=None, pad_edge=False)
    for name in ("source", "split", "documents", "tokens", "bytes", "bytes a token", "shards", "sampled"):
        table.add_column(name, justify="left" if name in ("source", "split", "sampled") else "right")
    for source in dataset.sources:
        for split, part in dataset.manifest["sources"][source]["splits"].items():
            sampled = _sampled(config, source) if split == "train" else ""
            _line(table, source, split, [part], sampled)
    if len(dataset.sources) > 1:
        for split in ("train", "held_out"):
            parts = [described["splits"][split] for described in dataset.manifest["sources"].values()]
            _line(table, "all", split, parts, "")
    return table


def _line(table: Table, source: str, split: str, parts: list[dict[str, Any]], sampled: str) -> None:
    documents, tokens, size = (sum(part[key] for part in parts) for key in ("documents", "tokens", "text_bytes"))
    shards = sum(len(part["shards"]["file"]) for part in parts)
    table.add_row(
        source,
        split.replace("_", " "),
        *(count(number) for number in (documents, tokens, size)),
        f"{size / tokens:.2f}",
        str(shards),
        sampled,
    )


def _sampled(config: DataConfig, source: str) -> str:
    weight, limit = config.weights.get(source), config.max_epochs.get(source)
    how = "by its size" if weight is None else f"with weight {weight}"
    return how if limit is None else f"{how}, at most {limit:g} times"
