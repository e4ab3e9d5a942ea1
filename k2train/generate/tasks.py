"""Held-out text and questions as tasks of lm-evaluation-harness, which reads them from local files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from k2train.generate.suite import Question
from k2train.paths import atomic_write

NEXT_LINE, HELD_OUT = "k2train_next_line", "k2train_held_out"


def write_tasks(folder: Path, questions: Sequence[Question], documents: Iterable[str]) -> list[str]:
    """Writes a YAML and a JSON-lines file for each task into a new folder, and returns the tasks' names.

    The YAML names the JSON lines by their whole path, as the harness wants it: a folder that moves is written anew.

    Args:
        folder: to be made.
        questions: the harness's ``acc_mutual_info`` chooses as ``next_line_accuracy`` does.
        documents: of which it tells ``bits_per_byte``, each by itself.

    Raises:
        OSError: the folder is there already, or cannot be written.
    """
    folder.mkdir(parents=True)
    asked = {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "answers",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": _metrics("acc", "acc_mutual_info"),
    }
    read = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": _metrics("bits_per_byte", "byte_perplexity"),
    }
    _write(folder, NEXT_LINE, asked, map(dataclasses.asdict, questions))
    _write(folder, HELD_OUT, read, ({"text": text} for text in documents if text))
    return [NEXT_LINE, HELD_OUT]


def _metrics(*names: str) -> list[dict[str, str]]:
    return [{"metric": name} for name in names]


def _write(folder: Path, name: str, settings: dict[str, Any], documents: Iterable[dict[str, Any]]) -> None:
    lines = folder.resolve() / f"{name}.jsonl"
    atomic_write(lines, "".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(lines)}},
        "test_split": "test",
        **settings,
        "metadata": {"version": 1},
    }
    atomic_write(folder / f"{name}.yaml", json.dumps(task, indent=2) + "\n")  # JSON is YAML
