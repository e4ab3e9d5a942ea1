"""Activation checkpointing changes what is kept, and nothing else: every number is the same to the last bit."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k2train.config import ModelConfig
from k2train.model import ExpertParallel, Transformer, build_model
from k2train.model.experts import _grouped

MakeModel = Callable[..., Transformer]
MakeTokens = Callable[..., Tensor]
MODES = ("none", "selective", "full")
KINDS = {
    "mla": {"balance_loss_weight": 0.01},
    "gqa": {"attention": "gqa", "num_key_value_heads": 1, "q_lora_rank": None, "kv_lora_rank": None},
}


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        del types
        self.found[str(operator)] = self.found.get(str(operator), 0) + 1
        return operator(*args, **(kwargs or {}))


def step(model: Transformer, tokens: Tensor, starts: Tensor | None = None) -> dict[str, Tensor]:
    """Loss, balance loss, gradients, and what is counted, over two micro-batches."""
    results = {}
    for number in range(2):
        loss, balance = model(tokens + number, tokens, starts)
        (loss.sum() + balance).backward()
        results |= {f"loss {number}": loss.detach(), f"balance {number}": balance.detach()}
    results |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(results) == 4 + len(list(model.parameters()))
    for name, layer in model.attention_layers():
        results |= {f"{name} maxima": layer.max_logits, f"{name} fallbacks": layer.max_logit_fallbacks}
    return results | {f"{name} loads": moe.gate.loads for name, moe in model.moe_layers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_an_unknown_mode_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="mode is 'selectiv', but must be one of none, selective, full"):
        make_model().checkpoint_activations("selectiv")


@pytest.mark.parametrize("backend", ["block", "flash_cpu", "math"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_choice_gives_the_same_bits(
    make_model: MakeModel, make_tokens: MakeTokens, kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k2train.model.causal.choose_backend", lambda *_, **__: backend)
    tokens = make_tokens(2, 140) % 60
    for starts in (None, torch.where(torch.arange(140) < 25, 0, 25).expand(2, -1)):
        results = {}
        for mode in MODES:
            model = make_model(**KINDS[kind])
            model.checkpoint_activations(mode)
            results[mode] = step(model, tokens, starts)
        for mode in MODES[1:]:
            assert_same(results[mode], results["none"])
        loads = results["none"]["layers.1.mlp loads"]
        assert loads.sum() == 2 * 2 * 2 * 140  # micro-batches, experts a token, rows, tokens: each counted once


@pytest.mark.parametrize("backend", ["block", "flash_cpu"])
def test_what_is_computed_again(
    make_model: MakeModel, make_tokens: MakeTokens, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted beside the model that keeps all. Latents here are less than half as wide, as in every shipped config."""
    monkeypatch.setattr("k2train.model.causal.choose_backend", lambda *_, **__: backend)
    kernel = {
        "block": "k2train.block_attention.default",
        "flash_cpu": "aten._scaled_dot_product_flash_attention_for_cpu.default",
    }[backend]
    tokens, found = make_tokens(1, 140), {}
    for mode in MODES:
        model = make_model(q_lora_rank=16, kv_lora_rank=10)  # 10 + 6 rope dims: 16 of 36
        model.checkpoint_activations(mode)
        with Calls() as calls:
            loss, _ = model(tokens, tokens)
            loss.sum().backward()
        found[mode] = calls.found
    layers, norms, products = 3, "aten.linalg_vector_norm.default", "aten.mm.default"
    assert found["none"][kernel] == found["selective"][kernel] == layers
    assert found["full"][kernel] == 2 * layers
    # Of two up-projections in each layer; of the norms, the input's and the latents'.
    assert found["selective"][products] - found["none"][products] == 2 * layers
    assert found["selective"][norms] - found["none"][norms] == 3 * layers
    assert found["full"][norms] - found["none"][norms] == 4 * layers
    # SwiGLU of the dense layer and of the shared experts of the others.
    assert found["selective"]["aten.silu.default"] - found["none"]["aten.silu.default"] == layers


def test_nothing_of_a_layer_is_kept_that_need_not_be(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    """Queries, and the product of a SwiGLU, between the forward and the backward pass."""
    alive = {}
    for mode in MODES:
        model = make_model()
        model.checkpoint_activations(mode)
        seen: list[weakref.ref[Tensor]] = []
        layer, mlp = model.layers[1].self_attn, model.layers[1].mlp.shared_experts
        project = layer.project

        def watched(*args, project=project, seen=seen):
            q, k, v = project(*args)
            seen.append(weakref.ref(q.untyped_storage()))
            return q, k, v

        layer.project = watched
        mlp.down_proj.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(weakref.ref(args[0].untyped_storage()))
        )
        loss, _ = model(make_tokens(1, 40), make_tokens(1, 40))
        alive[mode] = [ref() is not None for ref in seen]
        del loss
    assert alive == {"none": [True, True], "selective": [False, False], "full": [False, False]}


def test_grouped_experts_recompute_to_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 8), (5, 12, 8), (5, 12, 8), (5, 8, 12))  # x, w1, w3, w2
    index = torch.tensor([[0, 1], [1, 2], [4, 1], [0, 2], [2, 1], [4, 0]])
    drawn, scores = [torch.randn(shape, generator=generator) for shape in shapes], torch.rand(6, 2, generator=generator)
    results, calls = [], []
    for recompute in (False, True):
        x, *weights = inputs = [value.clone().requires_grad_() for value in drawn]
        own_scores = scores.clone().requires_grad_()
        with Calls() as counted:
            out = _grouped(x, index, own_scores, *weights, torch.bincount(index.flatten()), recompute=recompute)
            grads = torch.autograd.grad(out.square().sum(), (own_scores, *inputs))
        results.append((out, *grads))
        calls.append(counted.found)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert calls[1]["aten.silu.default"] == 2 * calls[0]["aten.silu.default"]


def worker(rank: int, store: str, config: ModelConfig) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    parallel = ExpertParallel(group=dist.group.WORLD, size=2, rank=rank)
    # Not equally many rows; the second time every token goes to rank 0's experts.
    tokens = torch.randint(60, (2 - rank, 23), generator=torch.Generator().manual_seed(rank))
    for crowded in (False, True):
        results = {}
        for mode in MODES:
            model = build_model(config, seed=0, expert_parallel=parallel)
            if crowded:
                for _, moe in model.moe_layers():
                    moe.gate.e_score_correction_bias[:2] += 2.0
            model.checkpoint_activations(mode)
            results[mode] = step(model, tokens)
        for mode in MODES[1:]:
            assert_same(results[mode], results["none"])
        assert results["full"]["layers.1.mlp loads"].sum() == 2 * 2 * tokens.numel()
    dist.destroy_process_group()


def test_two_processes_compute_again_in_step(config: ModelConfig, tmp_path: Path) -> None:
    """Recomputation repeats the all-to-alls: if the processes did so in another order, they would hang or mix rows."""
    mp.spawn(worker, args=(str(tmp_path / "store"), dataclasses.replace(config, balance_loss_weight=0.01)), nprocs=2)
