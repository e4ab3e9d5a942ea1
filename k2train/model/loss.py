"""Cross-entropy of a language-model head without holding all logits.

Shapes: N tokens, D model, V vocabulary; B rows of T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # a label that is not to be predicted, as in torch and transformers
# Logits of a chunk of tokens. On a CPU 4 MiB in fp32, which stay in cache and are allocated without fresh pages; on a
# GPU 512 MiB, as its products must be large to be fast.
CHUNK_LOGITS, CHUNK_LOGITS_GPU = 2**20, 2**27
# Logits that may be kept for the backward pass (64 MiB in fp32; on a GPU 4 GiB in bf16); of more, none are.
KEPT_LOGITS, KEPT_LOGITS_GPU = 2**24, 2**31


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``, where the product may be of a narrower dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:  # in one kernel, and the product is not rounded before the sum
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, rows: int) -> Tensor:
        target_N1 = labels_N.clamp(min=0)[:, None]
        most = KEPT_LOGITS_GPU if x_ND.is_cuda else KEPT_LOGITS
        keep = any(ctx.needs_input_grad) and len(x_ND) * len(weight_VD) <= most
        parts, kept = [], []
        for x, target in zip(torch.split(x_ND, rows), torch.split(target_N1, rows), strict=True):
            logits = torch.mm(x, weight_VD.t())
            parts.append(logits.log_softmax(-1, dtype=_wide(x)).gather(1, target).squeeze(1).neg_())
            if keep:
                kept.append(logits)
        ctx.save_for_backward(x_ND, weight_VD, labels_N, *kept)
        ctx.rows = rows
        return torch.cat(parts).masked_fill_(labels_N == IGNORE, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_ND, weight_VD, labels_N, *kept = ctx.saved_tensors
        grad_N1 = grad_N.masked_fill(labels_N == IGNORE, 0.0)[:, None]
        target_N1 = labels_N.clamp(min=0)[:, None]
        grad_x = torch.empty_like(x_ND)
        # Summed over chunks, hence in fp32 at least.
        grad_weight = torch.zeros_like(weight_VD, dtype=_wide(weight_VD))
        chunks = (torch.split(tensor, ctx.rows) for tensor in (x_ND, target_N1, grad_N1, grad_x))
        for number, (x, target, grad, out) in enumerate(zip(*chunks, strict=True)):
            logits = kept[number] if kept else torch.mm(x, weight_VD.t())
            # d loss / d logits = softmax - one-hot(label), rounded once
            shares = logits.softmax(-1, dtype=_wide(x))
            at_target = shares.gather(1, target).sub_(1).mul_(grad).to(x.dtype)
            grad_logits = torch.mul(shares, grad, out=shares if shares.dtype == x.dtype else torch.empty_like(logits))
            grad_logits.scatter_(1, target, at_target)
            torch.mm(grad_logits, weight_VD, out=out)
            _add_product_(grad_weight, grad_logits.t(), x)
        return grad_x, grad_weight.to(weight_VD.dtype), None, None


def cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """``-log softmax(x W^T)[label]`` of each token.

    The logits are made a chunk of tokens at a time, in the dtype of ``x_ND``; the softmax is fp32. They are made again
    in the backward pass, unless they are few (``KEPT_LOGITS``).

    Args:
        x_ND: normed hidden states.
        weight_VD: of the head.
        labels_N: token ids int64, or -100 for a token without loss and gradient.

    Returns:
        [N] nats in fp32, 0 where the label is -100.
    """
    rows = max(1, (CHUNK_LOGITS_GPU if x_ND.is_cuda else CHUNK_LOGITS) // weight_VD.shape[0])
    out: Tensor = _ChunkedCrossEntropy.apply(x_ND, weight_VD, labels_N, rows)  # type: ignore[no-untyped-call]
    return out


def document_losses(loss_BT: Tensor, labels_BT: Tensor, starts_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each document of a batch, from that of its tokens: nothing of the vocabulary's size is touched.

    Args:
        loss_BT: of each token, as ``Transformer`` returns it.
        labels_BT: those it was computed with.
        starts_BT: int64, the index of the first token of each token's document.

    Returns:
        Summed nats [B, T] and predicted tokens [B, T] int64 of the document that begins there; 0 where none does.
    """
    nats = torch.zeros_like(loss_BT).scatter_add_(1, starts_BT, loss_BT)
    return nats, torch.zeros_like(labels_BT).scatter_add_(1, starts_BT, (labels_BT != IGNORE).to(labels_BT.dtype))
