"""Which checkpoint did best on held-out text: the saver marks it, and retention keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Best:
    """Compares validations during the run, which all read the same text, at steps that have a checkpoint."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._least, self._noted = math.inf, (0, math.inf)

    def note(self, step: int, bits_per_byte: float) -> None:
        """A validation."""
        self._noted = step, bits_per_byte

    def claims(self, step: int) -> bool:
        """Whether the checkpoint that is about to be saved at this step is the best so far; it then is."""
        noted, value = self._noted
        if noted != step or not value < self._least:
            return False
        self._least = value
        return True

    def state_dict(self) -> dict[str, Any]:
        """The least bits a byte of any checkpoint, exactly."""
        return {"least": repr(self._least)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self._least = float(state["least"])
