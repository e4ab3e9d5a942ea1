"""Numbers that must stay in fp32 whatever dtype a module is cast to, and whether a forward pass is to be counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose buffers named in ``float32_buffers`` change device with it but never dtype.

    ``module.bfloat16()``, which DeepSpeed calls on the whole model, would otherwise round a router's selection bias
    (steps of 1e-3 are lost above 0.25 in bf16) and the max logits of attention.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self.float32_buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, buffer.to(after.device))
        return self


def counts(module: nn.Module) -> bool:
    """Whether this forward pass of ``module`` adds to its running counts: in training mode, and each pass once.

    Activation checkpointing runs a block's forward a second time from within the backward pass. There, and only
    there, autograd has a current graph task in this thread, for every kind of checkpointing (reentrant or not, and
    DeepSpeed's); torch.utils.checkpoint itself tells its recomputations apart by the same id.
    """
    return module.training and torch._C._current_graph_task_id() == -1
