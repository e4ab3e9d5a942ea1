"""SwiGLU feed-forward (arXiv 2002.05202): the dense layers and the shared experts.

Shapes: D model, I intermediate; leading dimensions are free.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from k2train.model.recompute import recomputed


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` without biases.

    Attributes:
        recompute: whether the backward pass makes silu and product again.
    """

    recompute = False

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        return recomputed(self._down, gate, up) if self.recompute else self._down(gate, up)

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out
