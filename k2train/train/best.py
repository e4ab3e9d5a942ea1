"""Which checkpoint did best on held-out text: the saver marks it, and retention keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Best:
    """Compares validations during the run, which all read the same text, at steps that have a checkpoint."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._least, self._noted, self._claim = (0, math.inf), (0, math.inf), (0, math.inf)

    def note(self, step: int, bits_per_byte: float) -> None:
        """A validation."""
        self._noted = step, bits_per_byte

    def claims(self, step: int) -> bool:
        """Whether the checkpoint that is about to be saved at this step will be the best so far."""
        noted, value = self._noted
        claimed = noted == step and value < self._least[1]
        self._claim = self._noted if claimed else self._least
        return claimed

    def saved(self, step: int) -> None:
        """The checkpoint is there: only now the next ones are compared with it."""
        self._least = self._claim

    @property
    def step(self) -> int:
        """Of the best checkpoint; 0: there is none."""
        return self._least[0]

    def state_dict(self) -> dict[str, Any]:
        """The least bits a byte of any checkpoint, exactly; of one that is about to be saved, with its own."""
        step, value = self._claim
        return {"step": step, "bits_per_byte": repr(value)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self._least = self._claim = state["step"], float(state["bits_per_byte"])
