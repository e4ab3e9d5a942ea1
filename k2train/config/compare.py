"""Whether two configs are the same run: what may change between two starts under one name, and what may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# These change where things go or how the work is cut up, never which numbers are learnt (but for rounding).
HARMLESS = (
    "runs_dir",
    "data.cache_dir",
    "data.workers",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "train.device",
    "train.threads",
    "parallel",
    "validate",
    "checkpoint",
    "faults",
    "track",
    "generate",
)


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Settings that make another run of it: sentences such as ``optim.lr was 0.01 and is now 0.02``.

    Args:
        before: the config of the run as it was started, from ``to_dict``.
        after: the config asked for now.
    """
    old, new = dict(_leaves(before, "")), dict(_leaves(after, ""))
    return [
        f"{key} was {_text(old, key)} and is now {_text(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if not _harmless(key) and old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]


_ABSENT = object()


def _harmless(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in HARMLESS)


def _text(leaves: Mapping[str, Any], key: str) -> str:
    value = leaves.get(key, _ABSENT)
    return "absent" if value is _ABSENT else "null" if value is None else str(value)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
