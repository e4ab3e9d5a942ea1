"""A counter of what is given to torch.distributed, by kind of traffic."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVES = ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather", "broadcast")
COLLECTIVES += ("all_to_all_single",)
# What called, innermost first: (module, function) -> kind.
CALLERS = {
    ("muonclip.sharded", "_send"): "Muon exchange",
    ("k2train.model.dispatch", "start"): "expert all-to-all",
    ("k2train.model.dispatch", "__call__"): "expert all-to-all",
    ("k2train.model.sequence", "_exchanged"): "sequence all-to-all",
    ("deepspeed.runtime.zero.stage_1_and_2", "allreduce_bucket"): "gradient reduce",
    ("deepspeed.runtime.engine", "allreduce_bucket"): "gradient reduce",
    ("deepspeed.runtime.comm.coalesced_collectives", "_torch_reduce_scatter_fn"): "gradient reduce",
    ("deepspeed.runtime.utils", "all_gather_into_tensor_dp_groups"): "parameter gather",
    ("deepspeed.runtime.zero.partition_parameters", "_dist_allgather_fn"): "parameter gather",
    ("deepspeed.runtime.zero.partition_parameters", "_allgather_params_coalesced"): "parameter gather",
    ("k2train.train.step", "_balance"): "counts",
    ("muonclip.qk_clip", "gather"): "counts",
}


class Counted:
    """Bytes by kind; ``others`` by caller, of what is no traffic of the model: norms, losses, who has how many."""

    def __init__(self) -> None:
        self.active = False
        self.bytes: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts in a block, from nothing."""
        self.active = True
        self.bytes.clear()
        self.others.clear()
        yield
        self.active = False

    def note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Adds the size of what is reduced or exchanged, or of the whole that is gathered or scattered."""
        group = kwargs.get("group")
        if not self.active or dist.get_world_size(group) == 1:
            return
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        size = sizes[1] if name == "all_to_all_single" else max(sizes)  # all_to_all_single(received, sent, ...)
        kind = next((CALLERS[place] for place in _callers() if place in CALLERS), None)
        if kind:
            self.bytes[kind] += size
        else:
            self.others[next(f"{module}.{function}" for module, function in _callers())] += size


def _callers() -> Iterator[tuple[str, str]]:
    frame = sys._getframe(3)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("torch.", "deepspeed.comm", "deepspeed.utils.nvtx")):
            yield module, frame.f_code.co_name
        frame = frame.f_back


def count_collectives() -> Counted:
    """Wraps the collectives of torch.distributed for good, before DeepSpeed keeps them with its process group."""
    counted = Counted()

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            counted.note(name, args, kwargs)
            return function(*args, **kwargs)

        return call

    assert not dist.is_initialized()
    for name in COLLECTIVES:
        setattr(torch.distributed, name, wrapped(name, getattr(torch.distributed, name)))
    return counted
