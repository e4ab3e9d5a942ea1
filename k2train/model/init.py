"""The start of every parameter: a pure function of (seed, its global name), whatever the rank, layout or device.

Scheme: matrices are normal with mean 0 and the standard deviation of ``standard_deviation``, norm weights are 1, the
router's selection bias and its counts are 0. A matrix is drawn on the CPU in fp32 from a Mersenne twister seeded with
the first 8 bytes of SHA-256 of ``"{seed}/{name}"``, or of ``"{seed}/{name}/{e}"`` for expert number e (counted over
all processes) of a stack of experts; then it is cast and moved. So an expert starts the same at any expert-parallel
size, and adding a layer changes no other (but for the scale of ``depth_scaled``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from k2train.config import ModelConfig
from k2train.model.attention import Attention
from k2train.model.router import Router

# How the names of matrices end that write into the residual stream: two a layer.
RESIDUAL_OUTPUTS = (".o_proj.weight", ".down_proj.weight", ".experts.w2")


def standard_deviation(config: ModelConfig, name: str) -> float:
    """Of the initial values of a matrix.

    ``initializer_range`` for all, with ``depth_scaled`` over the square root of ``2 * num_hidden_layers`` for those
    that write into the residual stream: so many of them add up there, and its variance at the end does not grow with
    depth (GPT-2: Radford et al., "Language Models are Unsupervised Multitask Learners", section 2.3; Megatron-LM).

    Args:
        config: of the model.
        name: global name of the parameter.
    """
    if config.initializer_scheme == "depth_scaled" and name.endswith(RESIDUAL_OUTPUTS):
        return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    return config.initializer_range


def draw(shape: torch.Size, *, seed: int, name: str, std: float) -> Tensor:
    """A matrix of normal numbers that depends on nothing but the arguments.

    Args:
        shape: of the matrix.
        seed: of the run.
        name: global name of the parameter (and number of the expert).
        std: standard deviation.

    Returns:
        fp32 on the CPU.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


@torch.no_grad()
def fill(parameter: Tensor, *, name: str, seed: int, config: ModelConfig, first_expert: int) -> None:
    """Gives one parameter its initial values, in place.

    Args:
        parameter: a norm's weight [D], a matrix, or a stack of experts' matrices.
        name: its global name, as ``named_parameters`` of a Transformer gives it.
        seed: of the run.
        config: of the model.
        first_expert: global number of the first expert in a stack; of no effect on others.
    """
    if parameter.ndim == 1:
        parameter.fill_(1.0)
        return
    std = standard_deviation(config, name)
    if parameter.ndim == 2:
        parameter.copy_(draw(parameter.shape, seed=seed, name=name, std=std))
        return
    for number, matrix in enumerate(parameter.unbind(), start=first_expert):
        matrix.copy_(draw(matrix.shape, seed=seed, name=f"{name}/{number}", std=std))


def fill_buffers(model: nn.Module) -> None:
    """Sets the router's selection bias and all counts and maxima to their start, in place."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.reset_max_logits()
        if isinstance(module, Router):
            module.e_score_correction_bias.zero_()
            module.loads.zero_()


def materialise(
    model: nn.Module,
    *,
    device: torch.device | str,
    seed: int,
    config: ModelConfig,
    first_expert: int,
    placed: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Gives a model on the meta device storage and its initial values, one parameter after the other.

    Each parameter stays the object that it was, so that an optimizer may have been built from shapes alone.

    Args:
        model: a Transformer on the meta device.
        device: where it will live.
        seed: of the run.
        config: of the model.
        first_expert: global number of the first expert that this process holds.
        placed: called with each parameter once it has its values. It may take them away before the next one is made,
            so that a process never holds the whole model (ZeRO stage 3).
    """
    for name, parameter in model.named_parameters():
        whole = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
        fill(whole, name=name, seed=seed, config=config, first_expert=first_expert)
        whole.__dict__.update(parameter.__dict__)  # the swap takes attributes along
        torch.utils.swap_tensors(parameter, whole)  # type: ignore[no-untyped-call]
        if placed is not None:
            placed(parameter)
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, torch.empty_like(buffer, device=device))
    fill_buffers(model)
