"""From a model's named parameters to one optimizer group a role: complete, disjoint, or an error with a name in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def split_parameters(named: Iterable[tuple[str, Tensor]], roles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Groups parameters by role, in the order in which the roles first appear.

    Args:
        named: as ``model.named_parameters()`` gives them.
        roles: the role of every parameter by name. Roles are the caller's words.

    Returns:
        A dict a role: ``params`` (a list of (name, parameter)) and ``role``; add ``algorithm``, ``lr`` and so on.

    Raises:
        ValueError: a parameter has no role, or comes twice (tied weights); a role is given to no parameter.
    """
    groups: dict[str, dict[str, Any]] = {}
    names: dict[int, str] = {}
    seen = set()
    for name, parameter in named:
        if name not in roles:
            raise ValueError(f"parameter {name} has no role: add it to roles, or it would never be trained")
        if id(parameter) in names:
            raise ValueError(
                f"parameters {names[id(parameter)]} and {name} are one tensor (tied): give it once, under one name"
            )
        names[id(parameter)] = name
        seen.add(name)
        groups.setdefault(roles[name], {"params": [], "role": roles[name]})["params"].append((name, parameter))
    if unknown := sorted(roles.keys() - seen):
        raise ValueError(
            f"role {roles[unknown[0]]!r} is given to {unknown[0]}, which is no parameter of the model "
            "(misspelt, or tied to another?)"
        )
    return list(groups.values())
