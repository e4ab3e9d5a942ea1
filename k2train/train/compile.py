"""``train.compile``: that there is a compiler is found out at the start, that it compiled anything after a step."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

from k2train.comm import together
from k2train.model import Transformer, compile_parts
from k2train.train.errors import RunError


class Compiled:
    """A model whose parts are compiled, and the proof of it: torch.compile may do nothing without a word."""

    def __init__(self, model: Transformer, *, device: torch.device, backend: str = "inductor") -> None:
        """Compiles something small, then has the model's parts compiled when they are first called; by all ranks.

        Raises:
            RunError: nothing can be compiled here; the sentence says what torch wants.
            FailedTogether: on another rank.
        """
        with together():
            try:
                torch.compile(_small, backend=backend, fullgraph=True)(torch.zeros(8, device=device))
            except RuntimeError as error:  # what torch.compile raises derives from it
                reason = str(error).split("\n")[0]
                needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler such as g++, or CXX,"
                raise RunError(
                    f"train.compile=true but torch.compile does not work here ({reason}): it needs {needed} and "
                    "TORCH_COMPILE_DISABLE unset; or set train.compile=false"
                ) from error
        compile_parts(model, backend=backend)
        self._before = _graphs()

    def check(self) -> None:
        """To be called after a step.

        Raises:
            RunError: no part was compiled.
        """
        if _graphs() == self._before:
            raise RunError(
                "train.compile=true but a step compiled nothing: is TORCHDYNAMO_DISABLE set? Unset it, or set "
                "train.compile=false"
            )


def _small(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def _graphs() -> int:
    """Graphs that this process has compiled so far."""
    return int(counters["stats"]["unique_graphs"])
