"""What both examples train: a language model of two blocks whose attention can be clipped, on random tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, BATCH, TOKENS = 50, 32, 4, 8, 16


class Attention(nn.Module):
    """Causal multi-head attention that keeps its largest logit of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.reset_max_logits()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        q, k, v = (f(x_BTD).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        future = torch.ones(x_BTD.shape[1], x_BTD.shape[1], dtype=torch.bool).triu(1)
        logits_BHTT = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        self.max_logits = self.max_logits.maximum(logits_BHTT.detach().float().amax((0, 2, 3)))
        mixed: Tensor = self.out((logits_BHTT.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return mixed

    def reset_max_logits(self) -> None:
        """QK-Clip calls it after each step."""
        self.max_logits = torch.full((HEADS,), -torch.inf)

    def row_scales(self, gamma_H: Tensor, *, alpha: float = 0.5) -> list[tuple[Tensor, Tensor]]:
        """How a head's factor is shared between queries and keys."""
        q_rows, k_rows = ((gamma_H**share).repeat_interleave(WIDTH // HEADS) for share in (alpha, 1 - alpha))
        return [(self.q.weight, q_rows), (self.k.weight, k_rows)]


class Block(nn.Module):
    """Attention and a feed-forward, each on a normed residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = Attention()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH, bias=False)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.norms[0](x_BTD))
        out: Tensor = x_BTD + self.mlp(self.norms[1](x_BTD))
        return out


class LanguageModel(nn.Module):
    """Tokens in, the mean loss of each next token out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] int64 to a scalar."""
        x_BTD = self.embedding(tokens_BT[:, :-1])
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return nn.functional.cross_entropy(self.head(x_BTD).flatten(0, 1), tokens_BT[:, 1:].flatten())

    def attention_layers(self) -> list[tuple[str, Attention]]:
        """What QK-Clip watches."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, Attention)]


def groups(named: Iterator[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Muon for the matrices inside the blocks, AdamW for embedding, head and norms."""
    parameters = list(named)
    matrices = [(name, p) for name, p in parameters if "blocks." in name and p.ndim == 2]
    others = [(name, p) for name, p in parameters if not ("blocks." in name and p.ndim == 2)]
    return [
        {"params": matrices, "algorithm": "muon"},
        {"params": others, "algorithm": "adamw", "weight_decay": 0.0},
    ]


def batches(steps: int, *, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
    """This rank's rows of each global batch: [B / ranks, T + 1] int64, counting upwards from a token at random."""
    for step in range(steps):
        first = torch.randint(VOCABULARY, (BATCH, 1), generator=torch.Generator().manual_seed(step))
        yield ((first + torch.arange(TOKENS + 1)) % VOCABULARY)[rank * BATCH // ranks : (rank + 1) * BATCH // ranks]
