"""Whether two configs are the same run: what may change between two starts under one name, and what may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# These tell how a start is made, and nothing of what is run.
OF_A_START = ("resume", "allow_changed")
# These change where things go or how the work is cut up, never which numbers are learnt (but for rounding).
HARMLESS = (
    *OF_A_START,
    "name",
    "runs_dir",
    "data.cache_dir",
    "data.workers",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "train.device",
    "train.threads",
    "train.deterministic",
    "train.hooks",
    "parallel",
    "validate",
    "checkpoint",
    "faults",
    "track",
    "generate",
    "profile",
)


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was."""

    key: str
    sentence: str  # optim.lr was 0.01 and is now 0.02
    harmless: bool  # what is learnt stays the same, but for rounding


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Settings of the run that differ between two configs, from ``to_dict``, in the order of their keys."""
    old, new = dict(leaves(before)), dict(leaves(after))
    return [
        Change(key, f"{key} was {_text(old, key)} and is now {_text(new, key)}", is_harmless(key))
        for key in sorted((old.keys() | new.keys()) - {*OF_A_START})
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]


def refuse_changes(changes: Sequence[Change], *, allowed: Sequence[str], what: str) -> str | None:
    """A sentence on the changes that make another run of it, and how to have them all the same; None if there are none.

    Args:
        changes: from ``changed_settings``.
        allowed: keys or groups that may have changed, ``allow_changed``.
        what: that was begun with the settings before, as in ``the run first in runs/first``.
    """
    refused = [change for change in changes if not change.harmless and not _within(change.key, allowed)]
    if not refused:
        return None
    sentences, keys = "; ".join(c.sentence for c in refused), ",".join([*allowed, *(c.key for c in refused)])
    return (
        f"{what} has other settings: {sentences}. Give this one another name, as in name=second, or take the settings "
        f"back; to go on with them all the same: allow_changed=[{keys}]"
    )


def is_harmless(key: str) -> bool:
    """Whether a setting leaves what is learnt as it is, but for rounding."""
    return _within(key, HARMLESS)


_ABSENT = object()


def _within(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _text(leaves: Mapping[str, Any], key: str) -> str:
    value = leaves.get(key, _ABSENT)
    return "absent" if value is _ABSENT else "null" if value is None else str(value)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a config from ``to_dict`` by their dotted keys; ``path`` is that of ``value``."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
