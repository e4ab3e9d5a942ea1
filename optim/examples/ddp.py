"""MuonClip under DistributedDataParallel: each rank updates the parameters that it owns, then tells the others.

    torchrun --standalone --nproc_per_node 2 optim/examples/ddp.py

DDP leaves the whole gradient on every rank. Without more, all of them would orthogonalise all matrices. Here each
matrix has one owner, which alone keeps its momentum: Newton-Schulz and the optimizer's memory are shared out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from model import LanguageModel, batches, groups
from muonclip import FlatLayout, MuonClip, Piece, QKClip
from muonclip.ownership import assign_owners, newton_schulz_cost
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class OwnedUpdates:
    """A MuonClip whose groups hold, on each rank, what this rank owns, flat."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        """Takes what MuonClip takes, and shares it out; called by all ranks."""
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._owned: list[tuple[Tensor, list[list[nn.Parameter]]]] = []  # this rank's flat tensor, parameters by owner
        self._optimizer = MuonClip(groups, **settings)
        layouts = {}
        for group, given in zip(self._optimizer.param_groups, groups, strict=True):
            named, muon = given["params"], group["algorithm"] == "muon"
            costs = [newton_schulz_cost(*p.shape) if muon else p.numel() for _, p in named]
            owners = assign_owners(costs, [{}] * len(named), ranks=self._ranks)  # every rank holds everything
            pieces: list[list[Piece]] = [[] for _ in range(self._ranks)]
            by_owner: list[list[nn.Parameter]] = [[] for _ in range(self._ranks)]
            for (name, p), owner in zip(named, owners, strict=True):
                offset = sum(earlier.numel() for earlier in by_owner[owner])
                pieces[owner].append(Piece(name, tuple(p.shape), 0, p.numel(), offset))
                by_owner[owner].append(p)
            flat = flattened(by_owner[self._rank], like=named[0][1])
            group["params"] = [flat]
            layouts[flat] = FlatLayout(tuple(map(tuple, pieces)), self._rank, None)
            self._owned.append((flat, by_owner))
        self._optimizer.shard(layouts)

    @torch.no_grad()
    def step(self) -> None:
        """Updates what this rank owns; all ranks then have all weights."""
        for flat, by_owner in self._owned:
            flat.grad = flattened([p.grad for p in by_owner[self._rank]], like=flat)
        self._optimizer.step()
        for flat, by_owner in self._owned:
            for owner, parameters in enumerate(by_owner):
                updated = flat if owner == self._rank else flat.new_empty(sum(p.numel() for p in parameters))
                dist.broadcast(updated, src=owner)
                for p, values in zip(parameters, updated.split([p.numel() for p in parameters]), strict=True):
                    p.copy_(values.view_as(p))


def flattened(tensors: list[Tensor], *, like: Tensor) -> Tensor:
    """One 1-D tensor of all; empty for none."""
    return torch.cat([like.new_empty(0), *(tensor.detach().flatten() for tensor in tensors)])


def train(steps: int) -> tuple[LanguageModel, list[float]]:
    """The model after some steps, and this rank's losses."""
    torch.manual_seed(0)
    model = LanguageModel()
    replica = DistributedDataParallel(model)
    clip = QKClip(model.attention_layers(), tau=1.0)
    optimizer = OwnedUpdates(groups(model.named_parameters()), lr=0.01, qk_clip=clip)
    losses = []
    for tokens in batches(steps, rank=dist.get_rank(), ranks=dist.get_world_size()):
        loss = replica(tokens)
        loss.backward()
        optimizer.step()
        replica.zero_grad()
        losses.append(loss.item())
    return model, losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    _, found = train(30)
    print(f"rank {dist.get_rank()}: loss {found[0]:.3f} to {found[-1]:.3f}")
    dist.destroy_process_group()
