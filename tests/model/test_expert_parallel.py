"""Experts shared out over two processes give the outputs and gradients of one process on the same global batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from k2train.config import ModelConfig
from k2train.model import ExpertParallel, Transformer, build_model, dispatch

ROWS = (slice(0, 2), slice(2, 3))  # sequences of each rank: not equally many


def run(model: Transformer, rows: slice, *, crowded: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token losses and gradients of these sequences; crowded: all tokens choose experts 0 and 1, of rank 0."""
    for _, moe in model.moe_layers():
        if crowded:
            moe.gate.e_score_correction_bias[:2] += 2.0
    tokens = torch.randint(61, (3, 23), generator=torch.Generator().manual_seed(0))[rows]
    loss, balance = model(tokens, tokens.roll(1, 1))
    # The mean over all sequences of the balance loss is a weighted mean of the ranks' means.
    (loss.sum() + balance * len(tokens)).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def events(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in the one layer's exchanges and shared experts, in order, forward and backward."""
    seen = []
    for name in ("start", "finish"):
        whole = getattr(dispatch._Flight, name)
        monkeypatch.setattr(
            dispatch._Flight, name, lambda *args, name=name, whole=whole, **kw: seen.append(name) or whole(*args, **kw)
        )
    (moe,) = (moe for _, moe in model.moe_layers())
    moe.shared_experts.register_forward_hook(lambda *_: seen.append("shared"))
    moe.shared_experts.register_full_backward_hook(lambda *_: seen.append("shared"))
    run(model, slice(0, 2), crowded=False)
    return seen


def worker(rank: int, store: str, config: ModelConfig) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    parallel = ExpertParallel(group=dist.group.WORLD, size=2, rank=rank)
    for crowded in (False, True):
        whole = build_model(config, seed=0)
        losses, gradients = run(whole, slice(0, 3), crowded=crowded)
        shared = build_model(config, seed=0, expert_parallel=parallel)
        own_losses, own_gradients = run(shared, ROWS[rank], crowded=crowded)

        torch.testing.assert_close(own_losses, losses[ROWS[rank]], atol=1e-6, rtol=1e-5)
        assert set(own_gradients) == set(gradients)
        for name, gradient in own_gradients.items():
            if ".experts." in name:
                half = config.n_routed_experts // 2
                expected = gradients[name][half * rank : half * (rank + 1)]
            else:
                dist.all_reduce(gradient)
                expected = gradients[name]
            assert (gradient - expected).abs().max() <= 1e-5 * (1 + expected.abs().max()), name
        for (_, one), (_, other) in zip(whole.moe_layers(), shared.moe_layers(), strict=True):
            loads = other.gate.loads.clone()
            dist.all_reduce(loads)
            assert torch.equal(loads, one.gate.loads)
            if crowded:
                assert loads.tolist()[2:] == [0] * 6

    with pytest.MonkeyPatch.context() as monkeypatch:
        one_layer = dataclasses.replace(config, num_hidden_layers=config.first_k_dense_replace + 1)
        order = events(build_model(one_layer, seed=0, expert_parallel=parallel), monkeypatch)
    # Shared experts are computed while tokens travel, and differentiated while their gradients do.
    assert order == [
        *("start", "shared", "finish", "start", "finish"),
        *("start", "finish", "start", "shared", "finish"),
    ]

    with torch.no_grad():
        tokens = torch.zeros(1, 5, dtype=torch.int64)
        torch.testing.assert_close(shared.eval().logits(tokens), whole.eval().logits(tokens), atol=1e-6, rtol=1e-5)
    dist.destroy_process_group()


def test_two_processes(config: ModelConfig, tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path / "store"), dataclasses.replace(config, balance_loss_weight=0.01)), nprocs=2)
