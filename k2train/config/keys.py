"""The keys that a config may have, read off its dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any

ABSENT = {"pipeline": "pp", "tensor": "tp"}  # ways of splitting a model that are left to others, and for short


def key_types(cls: type) -> dict[str, Any]:
    """Dotted key -> type hint, groups and their members alike; ``*`` stands for any name, as in ``optim.roles.*.lr``.

    Args:
        cls: a config dataclass.
    """
    return dict(_members(cls, ""))


def find_key(cls: type, key: str) -> Any | None:
    """The type hint of a dotted key; None if there is no such key."""
    return next((hint for known, hint in key_types(cls).items() if _same(known, key)), None)


def suggest_key(cls: type, key: str) -> str:
    """``did you mean optim.lr?``: the keys that a wrong one may stand for, wherever they are in the tree."""
    known = list(key_types(cls))
    last = key.rpartition(".")[2]
    if any(word in last for word in ABSENT) or {*last.split("_")} & {*ABSENT.values()}:
        return (
            f"k2train has no {' and no '.join(ABSENT)} parallelism: a model is split by parallel.zero_stage and "
            "parallel.expert_parallel, which `k2train plan --search` chooses"
        )
    if found := [k for k in known if k.rpartition(".")[2] == last and "*" not in k]:
        return f"did you mean {' or '.join(found[:3])}?"
    if found := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return f"did you mean {found[0]}?"
    by_last = {k.rpartition(".")[2]: k for k in reversed(known) if "*" not in k}
    if found := difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6):
        return f"did you mean {by_last[found[0]]}?"
    return f"the keys begin with {', '.join(k for k in known if '.' not in k)}"


def _same(known: str, key: str) -> bool:
    left, right = known.split("."), key.split(".")
    return len(left) == len(right) and all(a in ("*", b) for a, b in zip(left, right, strict=True))


def _members(hint: Any, path: str) -> Iterator[tuple[str, Any]]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if dataclasses.is_dataclass(hint):
        members = typing.get_type_hints(hint)
    elif typing.get_origin(hint) is dict:
        members = {"*": typing.get_args(hint)[1]}
    else:
        return
    for name, member in members.items():
        key = f"{path}.{name}" if path else name
        yield key, member
        yield from _members(member, key)
