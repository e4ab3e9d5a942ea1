"""MuonClip under FSDP2 (``fully_shard``): rows of each matrix lie on every rank and come together at one owner.

    torchrun --standalone --nproc_per_node 2 optim/examples/fsdp2.py

FSDP2 cuts each parameter along its first dimension (``Shard(0)``): a rank holds some of its rows, one interval of the
flattened parameter. That is all a ``FlatLayout`` wants to know. Between steps no rank holds a whole gradient or
momentum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from model import LanguageModel, batches, groups
from muonclip import FlatLayout, MuonClip, Piece, QKClip
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class ShardedUpdates:
    """A MuonClip whose groups hold this rank's rows, flat."""

    def __init__(self, groups: list[dict[str, Any]], mesh: DeviceMesh, **settings: Any) -> None:
        """Takes what MuonClip takes, and reads off which rows lie where; called by all ranks."""
        self._shards: list[tuple[Tensor, list[DTensor]]] = []
        self._optimizer = MuonClip(groups, **settings)
        layouts = {}
        for group, given in zip(self._optimizer.param_groups, groups, strict=True):
            parameters = [p for _, p in given["params"]]
            pieces: list[list[Piece]] = [[] for _ in range(mesh.size())]
            for rank in range(mesh.size()):
                offset = 0
                for name, p in given["params"]:
                    rows = -(-p.shape[0] // mesh.size())  # as torch.chunk cuts: the last get fewer
                    row = math.prod(p.shape[1:])
                    start, stop = (min(edge * rows, p.shape[0]) * row for edge in (rank, rank + 1))
                    if start < stop:
                        pieces[rank].append(Piece(name, tuple(p.shape), start, stop, offset))
                    offset += stop - start
            flat = flattened(parameters)
            group["params"] = [flat]
            layouts[flat] = FlatLayout(tuple(map(tuple, pieces)), mesh.get_local_rank(), mesh.get_group())
            self._shards.append((flat, parameters))
        self._optimizer.shard(layouts)

    @torch.no_grad()
    def step(self) -> None:
        """Updates this rank's rows; all ranks take part."""
        for flat, parameters in self._shards:
            flat.grad = flattened([p.grad for p in parameters])
        self._optimizer.step()
        for flat, parameters in self._shards:
            held = [p.to_local() for p in parameters]
            for rows, values in zip(held, flat.split([rows.numel() for rows in held]), strict=True):
                rows.copy_(values.view_as(rows))


def flattened(tensors: list[DTensor]) -> Tensor:
    """This rank's parts of all, in one 1-D tensor."""
    return torch.cat([tensor.detach().to_local().flatten() for tensor in tensors])


def train(steps: int) -> tuple[LanguageModel, list[float]]:
    """The model after some steps, and this rank's losses."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = LanguageModel()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    clip = QKClip(model.attention_layers(), tau=1.0)
    optimizer = ShardedUpdates(groups(model.named_parameters()), mesh, lr=0.01, qk_clip=clip)
    losses = []
    for tokens in batches(steps, rank=dist.get_rank(), ranks=dist.get_world_size()):
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return model, losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    _, found = train(30)
    print(f"rank {dist.get_rank()}: loss {found[0]:.3f} to {found[-1]:.3f}")
    dist.destroy_process_group()
