"""``k2train evaluate``: how good a run, a checkpoint, or a folder in Hugging Face's format is on prepared text."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from k2train.checkpoint import Checkpoint
from k2train.cli.suite import ask_of
from k2train.cli.trained import Trained, load_trained
from k2train.comm import World, close_world, open_world
from k2train.config import EvaluateConfig, RunConfig, parse
from k2train.data import Dataset, find_dataset, open_dataset, prepare
from k2train.generate import ANSWERS, Question, Remembering, next_line_accuracy, valid_syntax, write_tasks
from k2train.paths import RunPaths, cache_dir
from k2train.train.errors import RunError
from k2train.train.validate import (
    HeldOutLoss,
    bytes_of_tokens,
    held_out_sets,
    loss_of_sets,
    prepared_apart,
    refuse_other_tokenizer,
)


@dataclass(frozen=True)
class Text:
    """What a model is evaluated on.

    Attributes:
        dataset: whose text it is.
        apart: manifests of sets that are read beside it, by name.
        length: of a window, in tokens.
        document_mask: whether attention stays inside a document.
    """

    dataset: Dataset
    apart: Mapping[str, Path]
    length: int
    document_mask: bool


def run(config: EvaluateConfig) -> int:
    """Prints what was found; returns the exit status."""
    try:
        world = open_world(config.device)
        trained = load_trained(Path(config.run).expanduser(), precision=config.precision, world=world)
        text = text_for(trained, config)
        questions = ask_of(text.dataset, config.split, number=config.questions, length=text.length)
        if config.tasks is not None:
            documents = (found.decode("utf-8", "replace") for _, found in text.dataset.documents(config.split))
            names = write_tasks(Path(config.tasks).expanduser(), questions, documents)
            print(f"wrote {config.tasks}: the tasks {', '.join(names)}", file=sys.stderr)
        found = evaluate(trained, text, questions, config, world=world)
    finally:
        close_world()
    if config.json:
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        show(found)
    return 0


def text_for(trained: Trained, config: EvaluateConfig) -> Text:
    """What the model is evaluated on.

    Raises:
        RunError: it was encoded by another tokenizer; or a model in Hugging Face's format, which does not say what it
            was trained on, was given none.
        DataError: it cannot be opened.
    """
    if trained.checkpoint is not None:
        text = _of_run(trained.checkpoint, config)
        tokenizer = RunPaths(trained.checkpoint.folder.parent.parent).tokenizer
    elif config.data is not None and config.sequence_length is not None:
        text = Text(_prepared(config.data), {}, config.sequence_length, document_mask=False)
        tokenizer = trained.folder / "tokenizer.json"
    else:
        raise RunError(
            f"{trained.folder} does not say what it was trained on: give both data and sequence_length, as in "
            "data=DIR sequence_length=1024"
        )
    key = f"data={config.data}" if config.data else "the run's data, which was prepared anew,"
    refuse_other_tokenizer(key, text.dataset, sha256=trained.digest, whose="the model", path=tokenizer)
    return text


def _of_run(checkpoint: Checkpoint, config: EvaluateConfig) -> Text:
    """The text that is given, or else what the run was validated on; read as it was there."""
    state = checkpoint.manifest.state
    settings, apart = parse(RunConfig, state["config"]), {}
    if config.data is not None:
        dataset = _prepared(config.data)
    else:
        cache = cache_dir(settings.data.cache_dir)
        dataset = open_dataset(prepare(settings.data, cache=cache, progress=lambda *_: None))
        if dataset.fingerprint != state["data"]["dataset"]:
            print("the run's data has changed: it may have been trained on what is held out now", file=sys.stderr)
        if config.split == "held_out":
            apart = prepared_apart(settings)
    length = config.sequence_length or settings.train.sequence_length
    return Text(dataset, apart, length, settings.train.document_mask)


def _prepared(address: str) -> Dataset:
    return open_dataset(find_dataset(address, cache=cache_dir(None), limit=None))


def evaluate(
    trained: Trained, text: Text, questions: Sequence[Question], config: EvaluateConfig, *, world: World
) -> dict[str, Any]:
    """All that is told, fit for JSON.

    Raises:
        RunError: there is no text.
    """
    sets = held_out_sets(text.dataset, text.apart, sequence_length=text.length, split=config.split)
    if not any(each.own for each in sets.values()):
        raise RunError(f"{text.dataset.folder} has no text in split={config.split}: give other data, or another split")
    loss = loss_of_sets(
        trained.model,
        sets,
        windows=None if config.tokens is None else -(-config.tokens // text.length),
        bytes_of_token=bytes_of_tokens(trained.tokenizer),
        batch_size=config.batch_size,
        document_mask=text.document_mask,
        world=world,
    )
    found: dict[str, Any] = {
        "model": str(trained.folder),
        "data": str(text.dataset.folder),
        "split": config.split,
        "sequence_length": text.length,
        "read_of_each": config.tokens,
        **_numbers(loss.total, tokens=sum(each.tokens for each in sets.values() if each.own)),
        "sets": {name: _numbers(each, tokens=sets[name].tokens) for name, each in loss.sets.items()},
    }
    if config.questions:
        accuracy = next_line_accuracy(
            trained.model,
            trained.tokenizer,
            questions,
            batch_size=config.batch_size,
            length=text.length,
            device=world.device,
        )
        found |= {"questions": len(questions), "next_line_accuracy": _finite(accuracy)}
    if config.samples:
        scores = Remembering(trained.model, max_tokens=config.generate.max_tokens)
        share = valid_syntax(scores, trained.tokenizer, config.generate, number=config.samples)
        found |= {"samples": config.samples, "valid_syntax": _finite(share)}
    return found


def _numbers(found: HeldOutLoss, *, tokens: int) -> dict[str, float | None]:
    """Of a text of so many tokens, whether all of them were read or a few that stand for them."""
    return {"tokens": tokens, "loss": _finite(found.per_token), "bits_per_byte": _finite(found.bits_per_byte)}


def _finite(value: float) -> float | None:
    """JSON has no word for other numbers."""
    return value if math.isfinite(value) else None


def show(found: Mapping[str, Any]) -> None:
    """Prints it for people."""
    data, length = Path(found["data"]).name, found["sequence_length"]
    part = f", {found['read_of_each']:,} tokens of each text" if found["read_of_each"] else ""
    print(f"{found['model']} on {data}, {found['split']}, in windows of {length} tokens{part}\n")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("text", overflow="fold")
    for column in ("tokens", "nats a token", "bits per byte"):
        table.add_column(column, justify="right")
    for name, each in (found["sets"] | {"all": found}).items():
        table.add_row(name, f"{each['tokens']:,}", *(_four(each[key]) for key in ("loss", "bits_per_byte")))
    Console(file=sys.stdout, highlight=False).print(table)
    if "questions" in found:
        share = _four(found["next_line_accuracy"])
        print(f"\nknows the next line among {ANSWERS}: {share} of {found['questions']} questions; chance {1 / ANSWERS}")
    if "samples" in found:
        print(f"writes what parses as Python: {_four(found['valid_syntax'])} of the lines of {found['samples']} texts")


def _four(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
