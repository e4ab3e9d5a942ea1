"""The model token by token: what attention needs of earlier tokens is kept, and nothing is computed twice.

Of each token a layer keeps what its attention's ``remembered`` gives: with latent attention the normed latent and the
rotated rope key, kv_lora_rank + qk_rope_head_dim numbers for all heads together (arXiv 2405.04434, section 2.1.2).

Shapes: B rows, T tokens, S tokens that there is room for, W numbers a token and layer, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from k2train.model.transformer import Transformer


class Incremental:
    """Rows of tokens that grow, each at its own pace, and the scores of what may come next.

    Attributes:
        memory: [B, S, W] of each layer.
        lengths: tokens of each row so far.
    """

    def __init__(self, model: Transformer, *, rows: int, room: int) -> None:
        """Reserves the memory.

        Args:
            model: whole on this process, in evaluation mode.
            rows: sequences (B).
            room: tokens of each (S), at most max_position_embeddings.

        Raises:
            ValueError: the model has no positions for so many tokens.
        """
        if room > model.config.max_position_embeddings:
            raise ValueError(
                f"room={room} is more than max_position_embeddings={model.config.max_position_embeddings}: lower it"
            )
        self.model, self.lengths = model, [0] * rows
        weight = model.embed_tokens.weight
        self._cos, self._sin = model.rope_tables(room, weight.device)
        self._turns = torch.complex(self._cos, self._sin)
        self.memory = [weight.new_zeros(rows, room, attention.width) for _, attention in model.attention_layers()]

    @torch.inference_mode()
    def begin(self, row: int, tokens: Sequence[int]) -> Tensor:
        """Starts a row anew with these tokens, at least one. Returns scores of the next, [V] fp32."""
        T = len(tokens)
        x = self.model.embed_tokens(torch.tensor([list(tokens)], device=self._cos.device))
        for layer, memory in zip(self.model.blocks(), self.memory, strict=True):
            memory[row, :T] = layer.self_attn.remembered(layer.input_layernorm(x), self._turns[:T])[0]
            x, _ = layer(x, self._cos[:T], self._sin[:T])
        self.lengths[row] = T
        return self._scores(x[0, -1])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Adds a token to each row. Returns scores of the next ones, [B, V] fp32."""
        device, shortest, longest = self._cos.device, min(self.lengths), max(self.lengths)
        place: tuple[Tensor | slice, Tensor | int] = (slice(None), longest)
        turns, hidden_BS = self._turns[None, longest, None], None
        if shortest < longest:
            position_B = torch.tensor(self.lengths, device=device)
            place = (torch.arange(len(self.lengths), device=device), position_B)
            turns = self._turns[position_B, None]
            hidden_BS = torch.arange(longest + 1, device=device) > position_B[:, None]
        x_BD = self.model.embed_tokens(torch.tensor(list(tokens), device=device))
        for layer, memory in zip(self.model.blocks(), self.memory, strict=True):
            x_BD = layer.grow(x_BD, turns, memory[:, : longest + 1], place, hidden_BS)
        self.lengths = [length + 1 for length in self.lengths]
        return self._scores(x_BD)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Forgets all other rows."""
        index = torch.tensor(list(rows), device=self._cos.device)
        self.memory = [memory.index_select(0, index) for memory in self.memory]
        self.lengths = [self.lengths[row] for row in rows]

    def _scores(self, x: Tensor) -> Tensor:
        return F.linear(self.model.norm(x), self.model.head_weight).float()
