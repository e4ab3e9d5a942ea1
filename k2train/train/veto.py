"""The one place of a step where its update can still be refused, whatever the ZeRO stage: DeepSpeed's inside.

Each of DeepSpeed's optimizers takes the raw global gradient norm, asks ``is_invalid_grad_norm`` of its module about it,
and clears the gradients and returns, with nothing changed, if the answer is yes. The first question of a step is that
one; stages 1 and 2 ask again for each group that they clip. Stages 1 and 2 do not ask where they have found a gradient
that is not finite before that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def deciding(zero_optimizer: Any, refuses: Callable[[float | Tensor], bool]) -> Iterator[None]:
    """While it is open, DeepSpeed's check of the gradient norm is ours.

    Args:
        zero_optimizer: DeepSpeed's, of any stage.
        refuses: is given the raw norm, once a step and on all ranks; whether the update must not happen.
    """
    module: Any = sys.modules[type(zero_optimizer).__module__]
    original = module.is_invalid_grad_norm
    asked: list[bool] = []

    def first_question(norm: float | Tensor) -> bool:
        if asked:
            return bool(original(norm))
        asked.append(True)
        return refuses(norm)

    module.is_invalid_grad_norm = first_question
    try:
        yield
    finally:
        module.is_invalid_grad_norm = original
