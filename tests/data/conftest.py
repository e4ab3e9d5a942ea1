"""A small corpus of code-like text, and the config that reads it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from k2train.config import DataConfig, parse
from k2train.data import Dataset, open_dataset, prepare
from k2train.paths import config_dir

WORDS = ["alpha", "beta", "gamma", "delta", "self", "return", "def", "class", "value", "über", "naïve", "数据", "😀"]


def write_text(path: Path, *, words: int, seed: int) -> None:
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(
        rng.choice(WORDS) + rng.choice([" ", " ", "\n", "\n    ", "(", ") = ", "\r\n"]) for _ in range(words)
    )
    path.write_bytes(text.encode())


def ignore_progress(stage: str, done: int, total: int) -> None:
    del stage, done, total


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """DataConfig of configs/data/folder.yaml for tmp_path/corpus with a small vocabulary and these changes."""

    def make(**changes: Any) -> DataConfig:
        values = yaml.safe_load((config_dir() / "data" / "folder.yaml").read_text())
        values["tokenizer"] |= {"vocab_size": 320} | changes.pop("tokenizer", {})
        values["sources"]["folder"] |= changes.pop("source", {})
        return parse(DataConfig, values | {"path": str(tmp_path / "corpus"), "held_out": 0.2, "workers": 1} | changes)

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twelve documents in seven groups."""
    root = tmp_path / "corpus"
    for number in range(6):
        write_text(root / f"top{number}.txt", words=300, seed=number)
    for number in range(6):
        write_text(root / f"folder{number % 2}" / f"deep{number}.txt", words=200, seed=100 + number)
    return root


@pytest.fixture
def dataset(corpus: Path, tmp_path: Path, make_config: Callable[..., DataConfig]) -> Dataset:
    return open_dataset(prepare(make_config(), cache=tmp_path / "cache", progress=ignore_progress))
