"""``k2train generate``: text from a run, a checkpoint, or a folder in Hugging Face's format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from k2train.cli.trained import load_trained
from k2train.comm import close_world, open_world
from k2train.config import ConfigError, WriteConfig
from k2train.data import Tokenizer
from k2train.generate import Remembering, printable, sample_texts
from k2train.model import Transformer


def run(config: WriteConfig) -> int:
    """Prints the text while it is written; returns the exit status."""
    try:
        prompts = None if config.prompts is None else read_prompts(Path(config.prompts).expanduser())
        path, world = Path(config.run).expanduser(), open_world(config.device)
        trained = load_trained(path, precision=config.precision, world=world)
        if prompts is None:
            write_one(trained.model, trained.tokenizer, config)
        else:
            write_many(trained.model, trained.tokenizer, config, prompts)
    finally:
        close_world()
    return 0


def write_one(model: Transformer, tokenizer: Tokenizer, config: WriteConfig) -> None:
    """Prints the prompt and what follows, piece by piece."""
    scores = Remembering(model, max_tokens=config.generate.max_tokens)
    print(printable(config.generate.prompt), end="", flush=True)
    for _, piece in sample_texts(scores, tokenizer, [config.generate.prompt], config.generate):
        print(printable(piece), end="", flush=True)
    print()


def write_many(model: Transformer, tokenizer: Tokenizer, config: WriteConfig, prompts: Sequence[str]) -> None:
    """Prints a line of JSON for each prompt: the prompt, and the text that follows it."""
    for first in range(0, len(prompts), config.batch_size):
        batch = prompts[first : first + config.batch_size]
        texts = [""] * len(batch)
        scores = Remembering(model, max_tokens=config.generate.max_tokens)
        for number, piece in sample_texts(scores, tokenizer, batch, config.generate, first=first):
            texts[number] += piece
        for prompt, text in zip(batch, texts, strict=True):
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)


def read_prompts(path: Path) -> list[str]:
    """A prompt a line; of a .jsonl file the ``prompt`` of each line.

    Raises:
        ConfigError: a line has none, or the file has no line.
    """
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # not at U+2028, which JSON may hold
    if path.suffix == ".jsonl":
        lines = [_prompt(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not any(lines):
        raise ConfigError([f"prompts={path}: the file is empty: write a prompt on each line"])
    return lines


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ConfigError([f'prompts={path}: line {number} is not as {{"prompt": "def f("}}'])
    return prompt
