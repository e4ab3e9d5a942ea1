"""Token rows to the order of their experts and back, differentiably and without atomic adds.

Shapes: N tokens, K experts a token, M = N*K slots (slot n*K + k is token n for its k-th expert), D model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sorted_order(key_M: Tensor) -> tuple[Tensor, Tensor]:
    """The order that sorts slots by key, ties in the order given, and the place that each slot then has."""
    order = key_M.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order, place


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_M: Tensor, place_M: Tensor) -> Tensor:
        ctx.save_for_backward(place_M)
        ctx.tokens = len(x_ND)
        return x_ND.index_select(0, token_M)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Gathers and sums: deterministic, where index_add on a GPU is not.
        (place_M,) = ctx.saved_tensors
        rows = grad.index_select(0, place_M)
        if len(rows) != ctx.tokens:
            rows = rows.view(ctx.tokens, len(rows) // ctx.tokens, rows.shape[1]).sum(1)
        return rows, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weights_NK: Tensor, order_M: Tensor, place_M: Tensor) -> Tensor:
        ctx.save_for_backward(y_MD, weights_NK, order_M, place_M)
        rows_NKD = _by_token(y_MD, weights_NK, place_M)
        return torch.bmm(weights_NK[:, None].to(rows_NKD.dtype), rows_NKD).squeeze(1).to(y_MD.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_MD, weights_NK, order_M, place_M = ctx.saved_tensors
        rows_NKD = _by_token(y_MD, weights_NK, place_M)
        wide_ND = grad.to(rows_NKD.dtype)
        grad_weights = torch.bmm(rows_NKD, wide_ND[..., None]).squeeze(2).to(weights_NK.dtype)
        weights_M1 = weights_NK.flatten().index_select(0, order_M)[:, None]
        grad_MD = wide_ND.index_select(0, order_M // weights_NK.shape[1]).mul_(weights_M1)
        return grad_MD.to(y_MD.dtype), grad_weights, None, None


def _by_token(y_MD: Tensor, weights_NK: Tensor, place_M: Tensor) -> Tensor:
    """The rows of each token [N, K, D], as wide as its weights: rounding those would tilt a row as a whole."""
    N, K = weights_NK.shape
    rows_MD = y_MD.index_select(0, place_M).to(torch.promote_types(y_MD.dtype, weights_NK.dtype))
    return rows_MD.view(N, K, y_MD.shape[1])


def spread(x_ND: Tensor, order_M: Tensor, place_M: Tensor) -> Tensor:
    """Each token's row once for each of its slots, [M, D] in the order of ``order_M`` (both of ``sorted_order``)."""
    top_k = len(order_M) // len(x_ND) if len(x_ND) else 1
    out: Tensor = _Spread.apply(x_ND, order_M // top_k, place_M)  # type: ignore[no-untyped-call]
    return out


def combine(y_MD: Tensor, weights_NK: Tensor, order_M: Tensor, place_M: Tensor) -> Tensor:
    """The weighted sum of each token's K rows, [N, D], from rows in the order of ``order_M``."""
    out: Tensor = _Combine.apply(y_MD, weights_NK, order_M, place_M)  # type: ignore[no-untyped-call]
    return out
