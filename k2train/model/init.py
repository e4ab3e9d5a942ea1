"""The start of every parameter: a pure function of (seed, its global name), whatever the rank, layout or device.

Scheme: matrices are normal with mean 0 and standard deviation ``initializer_range``, norm weights are 1, the
router's selection bias and its counts are 0. A matrix is drawn on the CPU in fp32 from a Mersenne twister seeded with
the first 8 bytes of SHA-256 of ``"{seed}/{name}"``, or of ``"{seed}/{name}/{e}"`` for expert number e (counted over
all processes) of a stack of experts; then it is cast and moved. So an expert starts the same at any expert-parallel
size, and adding a layer changes no other.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from k2train.model.attention import Attention
from k2train.model.experts import Experts
from k2train.model.norm import RMSNorm
from k2train.model.router import Router


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
def initialise(model: nn.Module, *, seed: int, std: float, first_expert: int) -> None:
    """Fills every parameter and buffer of ``model`` in place.

    Args:
        model: a Transformer with storage.
        seed: of the run.
        std: initializer_range.
        first_expert: global number of the first expert that this process holds.
    """
    for prefix, module in model.named_modules():
        for suffix, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{suffix}"
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            elif isinstance(module, Experts):
                for number, matrix in enumerate(parameter.unbind(), start=first_expert):
                    matrix.copy_(draw(matrix.shape, seed=seed, name=f"{name}/{number}", std=std))
            else:
                parameter.copy_(draw(parameter.shape, seed=seed, name=name, std=std))
        if isinstance(module, Attention):
            module.reset_max_logits()
        if isinstance(module, Router):
            module.e_score_correction_bias.zero_()
            module.loads.zero_()
