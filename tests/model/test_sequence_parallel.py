"""Sequences shared out over two processes give the losses, gradients and counts of whole ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from k2train.config import ModelConfig, RopeScalingConfig
from k2train.model import SequenceParallel, Transformer, build_model

LENGTH = 46
YARN = RopeScalingConfig(
    factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.7
)
GQA = {"attention": "gqa", "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": None}
VARIANTS = (({}, "none"), ({"rope_scaling": YARN}, "selective"), ({"q_lora_rank": None}, "full"), (GQA, "none"))


def run(
    model: Transformer, parallel: SequenceParallel | None, *, documents: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token losses and gradients of two sequences, or of this process's part of them."""
    own = slice(0, LENGTH) if parallel is None else parallel.part(LENGTH)
    tokens = torch.randint(61, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    labels, starts = tokens.roll(-1, 1), torch.zeros(2, LENGTH, dtype=torch.int64)
    labels[:, -1] = labels[0, :30] = -100  # more in one part than in the other
    starts[0, 17:], starts[1, 5:], starts[1, 31:] = 17, 5, 31
    loss, balance = model(tokens[:, own], labels[:, own], starts if documents else None, parallel)
    # As the balance loss is a mean over processes, each one's part of it is that over their number.
    (loss.sum() + balance / (1 if parallel is None else parallel.size)).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worker(rank: int, store: str, config: ModelConfig) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    parallel = SequenceParallel(group=dist.group.WORLD, size=2, rank=rank)
    for changes, mode in VARIANTS:
        for documents in (False, True):
            whole, shared = (build_model(dataclasses.replace(config, **changes), seed=0) for _ in range(2))
            losses, gradients = run(whole, None, documents=documents)
            shared.checkpoint_activations(mode)
            own_losses, own_gradients = run(shared, parallel, documents=documents)

            torch.testing.assert_close(own_losses, losses[:, parallel.part(LENGTH)], atol=1e-6, rtol=1e-5)
            assert set(own_gradients) == set(gradients)
            for name, gradient in own_gradients.items():
                dist.all_reduce(gradient)
                assert (gradient - gradients[name]).norm() <= 1e-5 * (1e-3 + gradients[name].norm()), name
            for (_, one), (_, other) in zip(whole.moe_layers(), shared.moe_layers(), strict=True):
                loads = other.gate.loads.clone()
                dist.all_reduce(loads)
                assert torch.equal(loads, one.gate.loads)
            for (_, one), (_, other) in zip(whole.attention_layers(), shared.attention_layers(), strict=True):
                assert other.max_logits.isinf().sum() == 2  # the other process's heads
                dist.all_reduce(other.max_logits, dist.ReduceOp.MAX)
                torch.testing.assert_close(other.max_logits, one.max_logits, atol=1e-6, rtol=1e-5)
    dist.destroy_process_group()


def test_two_processes(config: ModelConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, num_attention_heads=4, balance_loss_weight=0.01)
    mp.spawn(worker, args=(str(tmp_path / "store"), config), nprocs=2)
