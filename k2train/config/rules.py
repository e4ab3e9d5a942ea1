"""What a config's field may be."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any


def is_own(name: object) -> bool:
    """Whether a name in the config is the dotted path of a person's own class, see ``own``; k2train's have no dot."""
    return isinstance(name, str) and "." in name


def rule(
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    one_of: tuple[str, ...] | None = None,
    own: bool = False,
    even: bool = False,
    default: Any = MISSING,
) -> Any:
    """A field with the values it may take; ``parse`` turns a breach into a sentence that names the key.

    It must be given, unless there is a ``default``. With ``own`` it may be the dotted path of a person's own class.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below, "one_of": one_of}
    flags = {key: True for key, given in {"even": even, "own": own}.items() if given}
    metadata = {key: value for key, value in bounds.items() if value is not None} | flags
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)
