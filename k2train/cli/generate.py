"""``k2train generate``: text from a run, a checkpoint, or a folder in Hugging Face's format."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from k2train.checkpoint import CheckpointError, find_checkpoint
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.cli.trained import load_model
from k2train.comm import World, close_world, open_world
from k2train.config import ConfigError, RunConfig, WriteConfig, parse
from k2train.data import Tokenizer
from k2train.export import ReleasedFolder, is_released, released_tokenizer
from k2train.generate import Remembering, printable, sample_texts
from k2train.model import Transformer
from k2train.paths import RunPaths


def run(config: WriteConfig) -> int:
    """Prints the text while it is written; returns the exit status."""
    try:
        prompts = None if config.prompts is None else read_prompts(Path(config.prompts).expanduser())
        model, tokenizer = load(config, open_world(config.device))
        if prompts is None:
            write_one(model, tokenizer, config)
        else:
            write_many(model, tokenizer, config, prompts)
    except ValueError as error:  # CheckpointError and ExportError among them
        print(f"k2train: error: {error}", file=sys.stderr)
        return 1
    finally:
        close_world()
    return 0


def load(config: WriteConfig, world: World) -> tuple[Transformer, Tokenizer]:
    """The model and its tokenizer.

    Raises:
        CheckpointError: the folder is no run, or one without a whole checkpoint.
        ExportError: it is a model that k2train does not have.
    """
    path, device = Path(config.run).expanduser(), world.device
    narrow = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if narrow else torch.float32
    if is_released(path):
        released = ReleasedFolder(path, defaults=parse(RunConfig, compose(TRAIN, [])).model)
        return released.load_model(device, dtype), released_tokenizer(path, released.settings)[1]
    checkpoint = find_checkpoint(path, world=world, say=lambda text: print(text, file=sys.stderr))
    file = RunPaths(checkpoint.folder.parent.parent).tokenizer
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no tokenizer beside {checkpoint.folder}: put the run's there")
    tokenizer = Tokenizer(
        file.read_text(encoding="utf-8"),
        engine="tokenizers",
        end_of_text=checkpoint.manifest.state["config"]["data"]["tokenizer"]["end_of_text"],
    )
    return load_model(checkpoint, device, dtype=dtype), tokenizer


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
