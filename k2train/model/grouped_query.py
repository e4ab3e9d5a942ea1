"""Grouped-query attention (GQA, arXiv 2305.13245): plain multi-head attention where heads may share keys and values.

Shapes: B batch, T tokens, D model, H query heads, G key and value heads (H/G consecutive query heads share one), d dims
of a query or key head, of which R with position (rope) and N without (nope), V dims of a value head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from k2train.config import ModelConfig
from k2train.model.attention import Attention, weigh


def rotate_half(x_BHTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first R dims of each head, whose pairs are (x_i, x_{i + R/2}), as in Llama and GLM-4.5.

    Args:
        x_BHTd: queries or keys, [rope | nope] in each head.
        cos: [T, R/2] fp32, or [B, 1, T, R/2] where positions differ between rows.
        sin: likewise.

    Returns:
        [B, H, T, d] in the dtype of ``x_BHTd``.
    """
    half = cos.shape[-1]
    first, second, rest = x_BHTd[..., :half], x_BHTd[..., half : 2 * half], x_BHTd[..., 2 * half :]
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat((turned[0].to(x_BHTd.dtype), turned[1].to(x_BHTd.dtype), rest), dim=-1)


class GroupedQueryAttention(Attention):
    """Queries, keys and values straight from the input; with as many key heads as query heads, multi-head attention.

    Weights are those of transformers' Llama (all of a head rotated) and Glm4Moe (part of it), bit for bit. Keys and
    values are repeated for their query heads before attention, so that every kernel and every head's largest logit work
    as they do for latent attention.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.num_key_value_heads is not None  # ModelConfig.check
        D, d = config.hidden_size, self.nope + self.rope
        self.key_heads = config.num_key_value_heads
        self.q_proj = nn.Linear(D, self.heads * d, bias=False)
        self.k_proj = nn.Linear(D, self.key_heads * d, bias=False)
        self.v_proj = nn.Linear(D, self.key_heads * self.value, bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, D, bias=False)

    def project(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Attention``."""
        q, k, v = (
            projection(x_BTD).unflatten(-1, (number, -1)).transpose(1, 2)
            for projection, number in (
                (self.q_proj, self.heads),
                (self.k_proj, self.key_heads),
                (self.v_proj, self.key_heads),
            )
        )
        k, v = (x.repeat_interleave(self.heads // self.key_heads, dim=1) for x in (rotate_half(k, cos, sin), v))
        return rotate_half(q, cos, sin), k, v

    @property
    def width(self) -> int:
        """See ``Attention``: each key head's key and value."""
        return self.key_heads * (self.nope + self.rope + self.value)

    def remembered(self, x_BTD: Tensor, turns: Tensor) -> Tensor:
        """See ``Attention``."""
        k_BTGd = self.k_proj(x_BTD).unflatten(-1, (self.key_heads, -1))
        rotated = rotate_half(k_BTGd, turns.real.unsqueeze(-2), turns.imag.unsqueeze(-2)).flatten(-2)
        return torch.cat((rotated, self.v_proj(x_BTD)), dim=-1)

    def recall(self, x_BD: Tensor, turns: Tensor, memory_BSW: Tensor, hidden_BS: Tensor | None) -> Tensor:
        """See ``Attention``."""
        G, width = self.key_heads, self.key_heads * (self.nope + self.rope)
        B, S, _ = memory_BSW.shape
        q_BHd = rotate_half(self.q_proj(x_BD).view(B, self.heads, -1), turns.real, turns.imag)
        q_BGnd = q_BHd.view(B, G, self.heads // G, -1)
        k_BGSd = memory_BSW[..., :width].view(B, S, G, -1).transpose(1, 2)
        v_BGSV = memory_BSW[..., width:].view(B, S, G, -1).transpose(1, 2)
        mixed_BGnV = weigh(q_BGnd, k_BGSd, hidden_BS, scale=self.scale) @ v_BGSV
        out: Tensor = self.o_proj(mixed_BGnV.flatten(1))
        return out

    def row_scales(self, gamma_H: Tensor, *, alpha: float = 0.5) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``Attention``. Rotation keeps lengths and commutes with scaling, so rope and nope rows are alike.

        Each head with a key of its own: query and key share gamma. Shared keys: the query takes all of it, whatever
        alpha is; the gamma of a group would clip heads that are below tau.
        """
        own_key = self.key_heads == self.heads
        rows = self.nope + self.rope
        yield self.q_proj.weight, (gamma_H**alpha if own_key else gamma_H).repeat_interleave(rows)
        if own_key:
            yield self.k_proj.weight, (gamma_H ** (1 - alpha)).repeat_interleave(rows)
