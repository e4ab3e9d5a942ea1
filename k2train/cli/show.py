"""``k2train data show``: what a prepared data set holds, and a look at its documents."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from k2train.cli.prepare import console_for_tables, prepared, totals
from k2train.config import RunConfig
from k2train.data import Dataset

SAMPLES = 3  # documents of a split that are shown
TOKENS = 80  # of each, at most


def run(config: RunConfig) -> int:
    """Shows the data that ``config`` trains on, made if need be; returns the exit status."""
    console = console_for_tables()
    dataset = prepared(config.data)
    console.print(totals(dataset, config.data))
    for source in dataset.sources:
        for split in ("train", "held_out"):
            for origin, text in samples(dataset, split, source):
                console.print(f"\n{source}, {split.replace('_', ' ')}: {origin}", style="bold", markup=False)
                console.print(Text(text))
    console.print(f"\ndata: {dataset.folder}", markup=False, soft_wrap=True)
    return 0


def samples(dataset: Dataset, split: str, source: str) -> Iterator[tuple[str, str]]:
    """(origin, beginning of the text) of documents that are spread evenly over a split's tokens."""
    stream = dataset.stream(split, source)
    last = ""
    for number in range(SAMPLES):
        position = len(stream) * number // SAMPLES
        (span,) = stream.spans(position, position + 1)
        if span.origin == last:
            continue
        last, start = span.origin, position - span.start
        ids = stream.read(start, min(start + TOKENS, len(stream))).tolist()
        end = ids.index(dataset.tokenizer.end_of_text) if dataset.tokenizer.end_of_text in ids else len(ids)
        yield span.origin, dataset.tokenizer.decode(ids[:end]) + ("" if end < len(ids) else " ...")
