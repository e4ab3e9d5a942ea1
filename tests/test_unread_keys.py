"""A key of the config that no code reads is a lie to the person who sets it."""

import ast
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from k2train.config import (
    CheckConfig,
    EvaluateConfig,
    ExportConfig,
    ImportConfig,
    PlanConfig,
    RehearseConfig,
    WriteConfig,
    key_types,
)

PACKAGE = Path(__file__).parents[1] / "k2train"
# Names under which code holds a group of the config other than the group's own.
ALIASES = {"config", "architecture", "scaling", "source", "phase", "part"}


def reads(paths: Iterable[Path]) -> set[tuple[str, str]]:
    """(holder, key) of each attribute that is read, as (train, threads) of ``self.config.train.threads``."""
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                holder = node.value.value if isinstance(node.value, ast.Subscript) else node.value
                name = holder.attr if isinstance(holder, ast.Attribute) else getattr(holder, "id", "")
                found.add((name, node.attr))
    return found


def unread(keys: dict[str, Any], found: set[tuple[str, str]]) -> set[str]:
    result = set()
    for key in keys:
        group, _, name = key.removesuffix(".*").rpartition(".")
        own = group.removesuffix(".*").rpartition(".")[2]
        if not any((holder, name) in found for holder in {own, *ALIASES}):
            result.add(key)
    return result


def test_every_key_is_read():
    apart = PACKAGE / "config"  # where keys are described, and held against each other
    found = reads(path for path in PACKAGE.rglob("*.py") if apart not in path.parents)
    if ("schedule", "parts") in found:  # where a schedule without phases becomes one phase
        found |= {("schedule", key) for holder, key in found if holder == "part"} | {("schedule", "phases")}
    schemas = (PlanConfig, RehearseConfig, WriteConfig, EvaluateConfig, CheckConfig, ExportConfig, ImportConfig)
    assert unread({key: hint for schema in schemas for key, hint in key_types(schema).items()}, found) == set()


def test_an_unread_key_would_be_found(tmp_path):
    @dataclasses.dataclass
    class Train:
        threads: int
        forgotten: int

    code = tmp_path / "code.py"
    code.write_text("print(self.config.train.threads, other.forgotten)\nconfig.train.forgotten = 1\n")
    keys = {"train": Train, **{f"train.{name}": kind for name, kind in key_types(Train).items()}}
    assert unread(keys, reads([code])) == {"train.forgotten"}
