"""Our exchange around attention is DeepSpeed's: its ``DistributedAttention`` gives the same outputs and gradients."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from k2train.model import SequenceParallel
from k2train.train.quiet import import_deepspeed


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def worker(rank, store):
    import_deepspeed("cpu")
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    deepspeed.init_distributed(auto_mpi_discovery=False)
    parallel = SequenceParallel(dist.group.WORLD, 2, rank)
    generator = torch.Generator().manual_seed(rank)
    # [B, H, t, d]: queries and keys wider than values, as in latent attention
    inputs = [torch.randn(2, 4, 9, width, generator=generator, requires_grad=True) for width in (10, 10, 7)]
    ours = parallel.to_sequence(attend(*parallel.to_heads(*inputs)))

    # Its tensors are [B, t, H, d].
    theirs = DistributedAttention(
        lambda *qkv: attend(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2), dist.group.WORLD
    )(*(x.transpose(1, 2) for x in inputs), 0).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(ours.shape, generator=generator)
    for one, other in zip(*(torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other)
    dist.destroy_process_group()


@pytest.mark.full
def test_the_exchange_of_deepspeed(tmp_path):
    mp.spawn(worker, args=(str(tmp_path / "store"),), nprocs=2)
