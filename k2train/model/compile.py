"""torch.compile for the parts of a layer that are many small operations: norms, SwiGLU, projections with rotation.

What lies between them stays as it is: attention kernels and experts are single operators already or depend on how many
tokens came to whom, which would be compiled anew in every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from k2train.model.attention import Attention
from k2train.model.mlp import MLP
from k2train.model.norm import RMSNorm

# By class the method that is compiled, whole (``fullgraph``): what cannot be compiled is an error, not a slow step.
PARTS: tuple[tuple[type[nn.Module], str], ...] = ((RMSNorm, "forward"), (MLP, "forward"), (Attention, "project"))


def compile_parts(model: nn.Module, *, backend: str = "inductor") -> None:
    """Makes training passes take compiled code; losses and gradients agree with eager ones within rounding.

    Layers of the same shapes share what is compiled, and a run has one shape: a handful of graphs whatever the number
    of layers and steps. Passes without gradients, whose shapes may vary (a text that grows token by token), stay eager.

    Args:
        model: its modules call compiled methods from now on; parameters and their names stay.
        backend: of torch.compile.
    """
    for module in model.modules():
        for kind, name in PARTS:
            if isinstance(module, kind):
                setattr(module, name, _compiled(getattr(module, name), backend=backend))


def _compiled(method: Callable[..., Any], *, backend: str) -> Callable[..., Any]:
    fast = torch.compile(method, fullgraph=True, dynamic=False, backend=backend)

    @functools.wraps(method)
    def call(*args: Any) -> Any:
        return fast(*args) if torch.is_grad_enabled() else method(*args)

    return call
