"""What a config's field may be."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any


def rule(
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    one_of: tuple[str, ...] | None = None,
    even: bool = False,
    default: Any = MISSING,
) -> Any:
    """A field with the values it may take; ``parse`` turns a breach into a sentence that names the key.

    It must be given, unless there is a ``default``.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below, "one_of": one_of}
    metadata = {key: value for key, value in bounds.items() if value is not None} | ({"even": True} if even else {})
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)
