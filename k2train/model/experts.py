"""The routed experts: many SwiGLU of one shape, each over the tokens that chose it.

Shapes: N tokens, K experts a token, M = N*K slots (slot n*K + k is token n for its k-th expert), R rows (the slots
sorted by expert, and padding), E experts of this process, D model, I intermediate. Weights are stacked: w1 (gate) and
w3 (up) [E, I, D], w2 (down) [E, D, I].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2train.model.permutation import combine, sorted_order, spread
from k2train.model.recompute import recomputed

# oneDNN prepares a bf16 product anew for each number of rows that it has not met, which takes longer than the product.
BF16_ROWS = 32


def _row_multiple(x: Tensor) -> int:
    return BF16_ROWS if x.dtype == torch.bfloat16 and not x.is_cuda else 1


def _padded(order_M: Tensor, loads: Sequence[int], *, multiple: int) -> tuple[Tensor, list[int]]:
    """The slot of each row, and rows of each expert: a ``multiple``; padding has the slot M, which is none."""
    if multiple == 1:
        return order_M, list(loads)
    sizes = [-(-load // multiple) * multiple for load in loads]
    parts = zip(torch.split(order_M, list(loads)), sizes, strict=True)
    padded = [F.pad(slots, (0, size - len(slots)), value=len(order_M)) for slots, size in parts]
    return torch.cat(padded), sizes


def _by_expert(
    slot_R: Tensor, sizes: list[int], weights_NK: Tensor, *, rows: Sequence[Tensor], stacks: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Of each expert that has rows: its tokens, their weights [rows, 1], and its part of ``rows`` and of ``stacks``.

    Padding is the last token with weight 0. All is cut at once, since views cost as much as small products.
    """
    M, K = weights_NK.numel(), weights_NK.shape[1]
    token_R = slot_R.clamp(max=M - 1) // K
    weight_R1 = F.pad(weights_NK.flatten(), (0, 1)).index_select(0, slot_R)[:, None]
    parts = zip(
        *(torch.split(tensor, sizes) for tensor in (token_R, weight_R1, *rows)),
        *(stack.unbind() for stack in stacks),
        strict=True,
    )
    return (part for part in parts if len(part[0]))


class _ExpertLoop(torch.autograd.Function):
    """One expert after the other: its tokens are gathered, computed and added up while they are in cache.

    Nothing that has a row for each slot is ever written in the model's width. The gradient of a weight needs no
    output of an expert either: <y, g> = <w2 h, g> = <h, w2^T g>, which the backward pass has at hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        order_M: Tensor,
        loads: list[int],
    ) -> Tensor:
        slot_R, sizes = _padded(order_M, loads, multiple=_row_multiple(x_ND))
        gate_RI, up_RI = (x_ND.new_empty(len(slot_R), w1.shape[1]) for _ in range(2))
        out_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
        parts = _by_expert(slot_R, sizes, weights_NK, rows=(gate_RI, up_RI), stacks=(w1, w3, w2))
        for token, weight, gate, up, gate_proj, up_proj, down_proj in parts:
            x = x_ND.index_select(0, token)
            torch.mm(x, gate_proj.t(), out=gate)
            torch.mm(x, up_proj.t(), out=up)
            y = torch.mm(F.silu(gate).mul_(up), down_proj.t())
            out_ND.index_add_(0, token, y.to(out_ND.dtype).mul_(weight))
        ctx.save_for_backward(x_ND, weights_NK, w1, w3, w2, slot_R, gate_RI, up_RI)
        ctx.sizes = sizes
        return out_ND.to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_NK, w1, w3, w2, slot_R, gate_RI, up_RI = ctx.saved_tensors
        grad_x_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
        grad_weight_R = weights_NK.new_empty(len(slot_R))
        grad_w1, grad_w3, grad_w2 = torch.empty_like(w1), torch.empty_like(w3), torch.empty_like(w2)
        for e, size in enumerate(ctx.sizes):
            if not size:
                grad_w1[e], grad_w3[e], grad_w2[e] = 0.0, 0.0, 0.0
        rows, stacks = (gate_RI, up_RI, grad_weight_R), (w1, w3, w2, grad_w1, grad_w3, grad_w2)
        parts = _by_expert(slot_R, ctx.sizes, weights_NK, rows=rows, stacks=stacks)
        for token, weight, gate, up, grad_weight, gate_proj, up_proj, down_proj, to_gate, to_up, to_down in parts:
            x, grad = x_ND.index_select(0, token), grad_ND.index_select(0, token)
            activated = F.silu(gate)
            hidden, grad_hidden = activated * up, torch.mm(grad, down_proj)
            torch.linalg.vecdot(hidden.to(weight.dtype), grad_hidden.to(weight.dtype), out=grad_weight)
            hidden.mul_(weight)
            grad_hidden.mul_(weight)
            torch.mm(grad.t(), hidden, out=to_down)
            grad_up = activated.mul_(grad_hidden)
            grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate)
            torch.mm(grad_gate.t(), x, out=to_gate)
            torch.mm(grad_up.t(), x, out=to_up)
            grad_x = torch.mm(grad_gate, gate_proj).addmm_(grad_up, up_proj)
            grad_x_ND.index_add_(0, token, grad_x.to(grad_x_ND.dtype))
        grad_weights = weights_NK.new_empty(weights_NK.numel() + 1).index_copy_(0, slot_R, grad_weight_R)[:-1]
        return grad_x_ND.to(x_ND.dtype), grad_weights.view_as(weights_NK), grad_w1, grad_w3, grad_w2, None, None


def _grouped(
    x_ND: Tensor,
    index_NK: Tensor,
    weights_NK: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    loads_E: Tensor,
    *,
    recompute: bool,
) -> Tensor:
    """By grouped matrix products over rows sorted by expert, whose counts stay on the GPU."""
    order_M, place_M = sorted_order(index_NK.flatten())
    offsets = loads_E.cumsum(0, dtype=torch.int32)
    x_MD = spread(x_ND, order_M, place_M)
    gate = F.grouped_mm(x_MD, w1.transpose(1, 2), offs=offsets)
    up = F.grouped_mm(x_MD, w3.transpose(1, 2), offs=offsets)

    def down(gate: Tensor, up: Tensor, weights_NK: Tensor) -> Tensor:
        rows_MD = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=offsets)
        return combine(rows_MD, weights_NK, order_M, place_M)

    return recomputed(down, gate, up, weights_NK) if recompute else down(gate, up, weights_NK)


def routed_experts(
    x_ND: Tensor,
    index_NK: Tensor,
    weights_NK: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    loads_E: Tensor,
    *,
    recompute: bool = False,
) -> Tensor:
    """``sum_k weights[n, k] * w2_e (silu(w1_e x[n]) * w3_e x[n])`` with e = index[n, k].

    Args:
        x_ND: tokens.
        index_NK: their experts; no expert twice for a token.
        weights_NK: fp32 (or float64).
        w1: gate weights [E, I, D].
        w3: up weights [E, I, D].
        w2: down weights [E, D, I].
        loads_E: how often each expert is in ``index_NK``. Any may be 0: that expert's gradients are zeros.
        recompute: whether the backward pass makes again what is between the up-projections and the sum. The loop that
            CPUs run keeps none of it in any case.

    Returns:
        [N, D].
    """
    # grouped_mm on a GPU takes bf16 whose rows are multiples of 16 bytes. There is no row where nobody is chosen.
    aligned = w1.shape[1] % 8 == 0 and w1.shape[2] % 8 == 0
    if x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and aligned and len(x_ND):
        return _grouped(x_ND, index_NK, weights_NK, w1, w3, w2, loads_E, recompute=recompute)
    order_M, _ = sorted_order(index_NK.flatten())
    out: Tensor = _ExpertLoop.apply(x_ND, weights_NK, w1, w3, w2, order_M, loads_E.tolist())  # type: ignore[no-untyped-call]
    return out


class Experts(nn.Module):
    """The weights of this process's experts, under the names that DeepSpeed's expert layers have: w1, w2, w3.

    Attributes:
        recompute: see ``routed_experts``.
    """

    recompute = False

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.w3 = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))

    def forward(self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor, loads_E: Tensor) -> Tensor:
        """The weighted sum over each token's experts; see ``routed_experts``."""
        return routed_experts(x_ND, index_NK, weights_NK, self.w1, self.w3, self.w2, loads_E, recompute=self.recompute)

    def one_token(self, x_1D: Tensor, index_K: Sequence[int], weights_K: Sequence[float]) -> Tensor:
        """``forward`` of a single token, [1, D], without gradient."""
        out = torch.zeros_like(x_1D, dtype=torch.promote_types(x_1D.dtype, torch.float32))
        for expert, weight in zip(index_K, weights_K, strict=True):
            hidden = F.silu(F.linear(x_1D, self.w1[expert])).mul_(F.linear(x_1D, self.w3[expert]))
            out.add_(F.linear(hidden, self.w2[expert]), alpha=weight)
        return out.to(x_1D.dtype)
