"""Activation checkpointing: what is computed again in the backward pass instead of being kept until then.

``full`` keeps a layer's input alone (arXiv 1604.06174). ``selective`` follows Kimi K2 (arXiv 2507.20534, section
2.4.3), which makes again what takes much memory and little work: norms, SwiGLU, the up-projections of latent
attention, the down-projections of experts. Neither changes a number: the same operations run on the same inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import k2train.model.block_attention  # noqa: F401  makes its operator known

Result = TypeVar("Result")
MODES = ("none", "selective", "full")
aten = torch.ops.aten
ATTENTION_KERNELS = (
    torch.ops.k2train.block_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)


def recomputed(function: Callable[..., Result], *args: Any) -> Result:
    """``function(*args)``, of which only ``args`` are kept: the backward pass calls it again.

    There is no randomness in the model, hence no state of a generator to restore. Every process of an expert-parallel
    group computes again at the same place of its backward pass, and so its all-to-alls still meet.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    result: Result = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result


def recomputed_around_attention(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """As ``recomputed``, but what ``_is_kept`` says is kept."""
    if not torch.is_grad_enabled():
        return function(*args)
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return result


def _policy(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operator, *args) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_kept(operator: Any, *args: Any) -> bool:
    """Much work behind few numbers: attention kernels, and products that at least halve the width, as latents do."""
    if operator is aten.mm.default:
        return bool(2 * args[1].shape[1] <= args[1].shape[0])
    return operator in ATTENTION_KERNELS
