"""Where the scores of the next token come from: from a memory of the tokens before, or from full passes over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from k2train.model import Incremental, Transformer, evaluating


class Scores(Protocol):
    """Rows of tokens that grow together. Context is at most what the model has positions for."""

    def begin(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Starts with these tokens, at least one a row. Returns scores [B, V] fp32."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Adds a token to each row. Returns scores [B, V] fp32."""

    def keep(self, rows: Sequence[int]) -> None:
        """Forgets all other rows."""


class Remembering:
    """Computes each token once. A row that has filled the context goes on from its last half."""

    def __init__(self, model: Transformer, *, max_tokens: int) -> None:
        """Takes a model that is whole on this process, and how many tokens each row may grow by."""
        self._model, self._max_tokens = model, max_tokens

    def begin(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """See ``Scores``."""
        self._rows = [list(row) for row in rows]
        longest = max(map(len, rows)) + self._max_tokens
        self._room = min(longest, self._model.config.max_position_embeddings)
        self._memory = Incremental(self._model, rows=len(rows), room=self._room)
        scores = [self._memory.begin(number, row[-self._room :]) for number, row in enumerate(self._rows)]
        return torch.stack(scores)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See ``Scores``."""
        for number, row in enumerate(self._rows):
            if self._memory.lengths[number] == self._room:
                self._memory.begin(number, row[-max(1, self._room // 2) :])
            row.append(tokens[number])
        return self._memory.step(tokens)

    def keep(self, rows: Sequence[int]) -> None:
        """See ``Scores``."""
        self._rows = [self._rows[row] for row in rows]
        self._memory.keep(rows)


class FullPasses:
    """A pass over the last window of context for each token: for a model in training, whatever wraps or shards it.

    All ranks of such a model must call it together.
    """

    def __init__(self, model: Transformer, device: torch.device | str) -> None:
        """Takes a model, and where its input lies."""
        self._model, self._device = model, device

    def begin(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """See ``Scores``."""
        self._rows = [list(row) for row in rows]
        return self._scores()

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See ``Scores``."""
        for row, token in zip(self._rows, tokens, strict=True):
            row.append(token)
        return self._scores()

    def keep(self, rows: Sequence[int]) -> None:
        """See ``Scores``."""
        self._rows = [self._rows[row] for row in rows]

    def _scores(self) -> Tensor:
        window = self._model.config.max_position_embeddings
        with evaluating(self._model):
            parts = [
                self._model.logits(torch.tensor([row[-window:]], device=self._device))[0, -1] for row in self._rows
            ]
        return torch.stack(parts)
