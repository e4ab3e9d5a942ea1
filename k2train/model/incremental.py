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
        self.memory = [weight.new_zeros(rows, room, attention.width) for _, attention in model.attention_layers()]

    @torch.no_grad()
    def begin(self, row: int, tokens: Sequence[int]) -> Tensor:
        """Starts a row anew with these tokens, at least one. Returns scores of the next, [V] fp32."""
        T = len(tokens)
        ids_1T = torch.tensor([list(tokens)], device=self._cos.device)
        cos, sin = self._cos[:T], self._sin[:T]
        x = self.model.embed_tokens(ids_1T)
        for layer, memory in zip(self.model.blocks(), self.memory, strict=True):
            memory[row, :T] = layer.self_attn.remembered(layer.input_layernorm(x), cos, sin)[0]
            x, _ = layer(x, cos, sin)
        self.lengths[row] = T
        return self._scores(x[0, -1])

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Adds a token to each row. Returns scores of the next ones, [B, V] fp32."""
        device, longest = self._cos.device, max(self.lengths) + 1
        position_B = torch.tensor(self.lengths, device=device)
        cos, sin = self._cos[position_B, None], self._sin[position_B, None]  # [B, 1, R/2]
        hidden_BS = None
        if min(self.lengths) + 1 < longest:
            hidden_BS = torch.arange(longest, device=device) > position_B[:, None]
        row_B = torch.arange(len(self.lengths), device=device)
        x_BD = self.model.embed_tokens(torch.tensor(list(tokens), device=device))
        for layer, memory in zip(self.model.blocks(), self.memory, strict=True):
            normed = layer.input_layernorm(x_BD)
            memory[row_B, position_B] = layer.self_attn.remembered(normed[:, None], cos, sin)[:, 0]
            x_BD = x_BD + layer.self_attn.recall(normed, cos, sin, memory[:, :longest], hidden_BS)
            x_BD = x_BD + layer.feed_forward(layer.post_attention_layernorm(x_BD)[:, None])[:, 0]
        self.lengths = [length + 1 for length in self.lengths]
        return self._scores(x_BD)

    def keep(self, rows: Sequence[int]) -> None:
        """Forgets all other rows."""
        index = torch.tensor(list(rows), device=self._cos.device)
        self.memory = [memory.index_select(0, index) for memory in self.memory]
        self.lengths = [self.lengths[row] for row in rows]

    def _scores(self, x: Tensor) -> Tensor:
        return F.linear(self.model.norm(x), self.model.head_weight).float()
