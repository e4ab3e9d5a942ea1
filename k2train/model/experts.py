"""The routed experts: many SwiGLU of one shape, each over its own rows.

Shapes: M rows (a token once for each of its experts), sorted by expert; E experts of this process, D model,
I intermediate. Weights are stacked: w1 (gate) and w3 (up) [E, I, D], w2 (down) [E, D, I].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ExpertLoop(torch.autograd.Function):
    """One expert after the other, each matrix product written in place into the result for all.

    Under autograd each expert would make views and small results, to be concatenated and stacked in both passes.
    """

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, loads: list[int]) -> Tensor:
        gate, up = x_MD.new_empty(len(x_MD), w1.shape[1]), x_MD.new_empty(len(x_MD), w1.shape[1])
        rows = (torch.split(x_MD, loads), torch.split(gate, loads), torch.split(up, loads))
        for x_e, gate_e, up_e, w1_e, w3_e in zip(*rows, w1.unbind(), w3.unbind(), strict=True):
            if len(x_e):
                torch.mm(x_e, w1_e.t(), out=gate_e)
                torch.mm(x_e, w3_e.t(), out=up_e)
        hidden = F.silu(gate).mul_(up)
        out = torch.empty_like(x_MD)
        for hidden_e, out_e, w2_e in zip(torch.split(hidden, loads), torch.split(out, loads), w2.unbind(), strict=True):
            if len(hidden_e):
                torch.mm(hidden_e, w2_e.t(), out=out_e)
        ctx.save_for_backward(x_MD, w1, w3, w2, gate, up)
        ctx.loads = loads
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, w1, w3, w2, gate, up = ctx.saved_tensors
        loads = ctx.loads
        activated = F.silu(gate)
        hidden = activated * up
        grad_hidden = torch.empty_like(hidden)
        grad_w1, grad_w3, grad_w2 = torch.empty_like(w1), torch.empty_like(w3), torch.empty_like(w2)
        rows = (torch.split(grad, loads), torch.split(hidden, loads), torch.split(grad_hidden, loads))
        for grad_e, hidden_e, grad_hidden_e, w2_e, out_e in zip(*rows, w2.unbind(), grad_w2.unbind(), strict=True):
            torch.mm(grad_e.t(), hidden_e, out=out_e)  # zeros for an expert without rows
            if len(grad_e):
                torch.mm(grad_e, w2_e, out=grad_hidden_e)
        grad_up = activated.mul_(grad_hidden)
        grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate)
        grad_x = torch.empty_like(x)
        inputs = (
            torch.split(x, loads),
            torch.split(grad_x, loads),
            torch.split(grad_gate, loads),
            torch.split(grad_up, loads),
        )
        weights = (w1.unbind(), w3.unbind(), grad_w1.unbind(), grad_w3.unbind())
        for x_e, grad_x_e, grad_gate_e, grad_up_e, w1_e, w3_e, out1_e, out3_e in zip(*inputs, *weights, strict=True):
            torch.mm(grad_gate_e.t(), x_e, out=out1_e)
            torch.mm(grad_up_e.t(), x_e, out=out3_e)
            if len(x_e):
                torch.mm(grad_gate_e, w1_e, out=grad_x_e)
                grad_x_e.addmm_(grad_up_e, w3_e)
        return grad_x, grad_w1, grad_w3, grad_w2, None


def _grouped(x_MD: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, loads_E: Tensor) -> Tensor:
    """The same by grouped matrix products, whose row counts stay on the GPU."""
    offsets = loads_E.cumsum(0, dtype=torch.int32)
    gate = F.grouped_mm(x_MD, w1.transpose(1, 2), offs=offsets)
    up = F.grouped_mm(x_MD, w3.transpose(1, 2), offs=offsets)
    return F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=offsets)


def expert_mlps(x_MD: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, loads_E: Tensor) -> Tensor:
    """``w2_e (silu(w1_e x) * w3_e x)`` for each row x of expert e.

    Args:
        x_MD: rows sorted by expert.
        w1: gate weights [E, I, D].
        w3: up weights [E, I, D].
        w2: down weights [E, D, I].
        loads_E: rows of each expert, int64; their sum is M. Any may be 0: that expert's gradients are zeros.

    Returns:
        [M, D] in the order of ``x_MD``.
    """
    # grouped_mm on a GPU takes bf16 whose rows are multiples of 16 bytes.
    if x_MD.is_cuda and x_MD.dtype == torch.bfloat16 and w1.shape[1] % 8 == 0 and w1.shape[2] % 8 == 0:
        return _grouped(x_MD, w1, w3, w2, loads_E)
    out: Tensor = _ExpertLoop.apply(x_MD, w1, w3, w2, loads_E.tolist())  # type: ignore[no-untyped-call]
    return out


class Experts(nn.Module):
    """The weights of this process's experts, under the names that DeepSpeed's expert layers have: w1, w2, w3."""

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.w3 = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))

    def forward(self, x_MD: Tensor, loads_E: Tensor) -> Tensor:
        """Rows sorted by expert through their experts; see ``expert_mlps``."""
        return expert_mlps(x_MD, self.w1, self.w3, self.w2, loads_E)
