"""The processes that share out a sequence. DeepSpeed is not told of them.

To ZeRO a part of a sequence is one more share of the batch: gradients are summed over all processes, and optimizer
state is cut over all of them. DeepSpeed's own groups (``mpu``) would have it divide gradients by the number of whole
sequences, as suits a loss that is a mean over a part; ours is a sum over the tokens of the global batch (``step``).
"""

from __future__ import annotations

import torch.distributed as dist

from k2train.comm import World
from k2train.model import SequenceParallel


def sequence_group(world: World, *, size: int) -> SequenceParallel | None:
    """The group of ``size`` consecutive ranks that this one shares sequences with; None for size 1."""
    if size == 1:
        return None
    group, _ = dist.new_subgroups(size)  # type: ignore[no-untyped-call]
    return SequenceParallel(group, size, world.rank % size)
