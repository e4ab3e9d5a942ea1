"""The outside truth: transformers' models with the same weights give the same numbers.

DeepseekV3ForCausalLM has latent attention; with grouped queries it is Glm4MoeForCausalLM, without experts Llama.

It reads our weights in the released layout, by its own code for released checkpoints, and gives its gradients in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hugging_face import released_layout, released_tensors, to_transformers
from torch import Tensor

from k2train.config import ModelConfig, RopeScalingConfig, parse
from k2train.model import Transformer

LENGTH = 137  # more than one block of attention rows, and beyond the original context of each YaRN but K2's


def shipped(name: str) -> dict[str, Any]:
    """All keys of a config in configs/model, with the tests' vocabulary."""
    path = Path(__file__).parents[2] / "configs" / "model" / f"{name}.yaml"
    return {**vars(parse(ModelConfig, yaml.safe_load(path.read_text()))), "vocab_size": 61}


def yarn(**values: float) -> RopeScalingConfig:
    defaults = {"factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 4.0, "beta_slow": 1.0}
    return RopeScalingConfig(**{**defaults, "mscale": 1.0, "mscale_all_dim": 1.0, **values})


K2_YARN = yarn(factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "as_k2": {},
    "nano": shipped("nano"),
    "no_q_latent": {"q_lora_rank": None},
    "yarn": {"rope_scaling": yarn()},
    "yarn_with_a_ratio_of_mscales": {"rope_scaling": yarn(mscale_all_dim=0.7)},
    "yarn_without_mscale": {"rope_scaling": yarn(beta_fast=32.0, mscale=0.0, mscale_all_dim=0.0)},
    "yarn_of_k2": {"rope_scaling": K2_YARN, "qk_rope_head_dim": 16, "rope_theta": 50000.0},
    "groups": {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "groups_and_no_q_latent": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4, "q_lora_rank": None},
    "dense_layers_first": {"num_hidden_layers": 4, "first_k_dense_replace": 3},
    "no_dense_layer": {"first_k_dense_replace": 0},
    "all_dense": {"first_k_dense_replace": 3},
    "shared_experts": {"n_shared_experts": 3},
    "tied": {"tie_word_embeddings": True},
    "weights_not_normalised": {"norm_topk_prob": False},
    "scaling_of_k2": {"routed_scaling_factor": 2.827},
    "odd_sizes": {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "qk_nope_head_dim": 11,
        "qk_rope_head_dim": 10,
        "v_head_dim": 13,
        "q_lora_rank": 17,
        "kv_lora_rank": 9,
        "intermediate_size": 51,
        "moe_intermediate_size": 11,
        "n_routed_experts": 7,
        "num_experts_per_tok": 3,
    },
    # With normalised weights a single expert has weight 1, and the router a gradient of rounding errors.
    "one_expert_a_token_and_wide_values": {"v_head_dim": 24, "num_experts_per_tok": 1, "norm_topk_prob": False},
}
GQA = {"attention": "gqa", "num_attention_heads": 6, "num_key_value_heads": 2, "q_lora_rank": None}
GQA |= {"kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 10, "v_head_dim": 10}
LLAMA = {**GQA, "first_k_dense_replace": 3}
VARIANTS |= {
    "gqa": GQA,
    "gqa_partly_rotated": {**GQA, "qk_nope_head_dim": 6, "v_head_dim": 16},
    "gqa_of_groups_tied": {**GQA, "n_group": 2, "topk_group": 1, "n_shared_experts": 2, "tie_word_embeddings": True},
    "one_key_head": {**GQA, "num_key_value_heads": 1},
    "small-gqa": shipped("small-gqa"),
    "llama": LLAMA,
    "llama_multi_head": {**LLAMA, "num_key_value_heads": 6, "hidden_size": 42},
    "llama_tied": {**LLAMA, "tie_word_embeddings": True},
    "small-dense": shipped("small-dense"),
    # The temperature lies in the tables alone: that of the softmax is DeepSeek's.
    "llama_yarn": {**LLAMA, "rope_scaling": yarn(mscale=0.0, mscale_all_dim=0.0)},
}
CASES = [(variant, LENGTH) for variant in VARIANTS] + [
    (variant, length) for variant in ("as_k2", "yarn", "groups", "odd_sizes", "gqa", "llama") for length in (1, 33)
]


@contextmanager
def watch_routers(model: Any, of: Callable[[Any], tuple[Tensor, Tensor]]) -> Iterator[list[Tensor]]:
    """The weights with which a forward pass sends tokens to experts, [N, E] for each router, 0 where not chosen."""
    found: list[Tensor] = []

    def note(gate: Any, _: Any, output: Any) -> None:
        index_NK, weights_NK = of(output)
        dense_NE = weights_NK.new_zeros(len(index_NK), len(gate.weight)).scatter(1, index_NK, weights_NK)
        assert (dense_NE > 0).sum() == index_NK.numel()
        found.append(dense_NE.detach())

    hooks = [module.register_forward_hook(note) for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("variant", "length"), CASES)
def test_logits_loss_routing_and_gradients(
    variant: str, length: int, make_model: Callable[..., Transformer], make_tokens: Callable[..., Tensor]
) -> None:
    model = make_model(**VARIANTS[variant])
    theirs = to_transformers(model)
    tokens, labels = make_tokens(2, length), make_tokens(2, length, seed=1)
    labels[0, : length // 15] = -100

    with watch_routers(theirs, lambda output: (output[2], output[1])) as expected_routes:
        logits = theirs(input_ids=tokens).logits
    with watch_routers(model, lambda output: (output[0], output[1])) as routes:
        assert (model.logits(tokens) - logits).abs().max() <= 1e-5
    assert len(routes) == len(expected_routes) == len(model.moe_layers())
    for route, expected_route in zip(routes, expected_routes, strict=True):
        assert torch.equal(route > 0, expected_route > 0)
        torch.testing.assert_close(route, expected_route, atol=1e-6, rtol=1e-5)

    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, length)
    loss, balance = model(tokens, labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    assert balance == 0

    scale = torch.rand(2, length, generator=torch.Generator().manual_seed(2))
    (loss * scale).sum().backward()
    (expected * scale).sum().backward()
    wanted = released_layout(theirs, {name: gradient(p) for name, p in theirs.named_parameters()})
    found = released_tensors({name: gradient(p) for name, p in model.named_parameters()})
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        assert (grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-7, name


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_the_bias_decides_who_is_chosen(
    make_model: Callable[..., Transformer], make_tokens: Callable[..., Tensor]
) -> None:
    """Else the test above could not tell whether it is heeded."""
    model, tokens = make_model(), make_tokens(2, LENGTH)
    with watch_routers(model, lambda output: (output[0], output[1])) as biased:
        model.logits(tokens)
    for _, moe in model.moe_layers():
        moe.gate.e_score_correction_bias.zero_()
    with watch_routers(model, lambda output: (output[0], output[1])) as unbiased:
        model.logits(tokens)
    assert ((biased[0] > 0) != (unbiased[0] > 0)).any(1).float().mean() > 0.1


EXTENDED = {
    "K2_to_32K": yarn(original_max_position_embeddings=4096, beta_fast=1.0),
    "K2_to_128K": K2_YARN,
    "DeepSeek_V3": yarn(factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0),
    "ratio_of_mscales": yarn(factor=32.0, original_max_position_embeddings=4096, mscale=0.7, mscale_all_dim=1.3),
    "no_mscale": yarn(factor=32.0, original_max_position_embeddings=4096, mscale=0.0, mscale_all_dim=0.0),
}


@pytest.mark.parametrize("name", EXTENDED)
def test_logits_at_positions_that_only_yarn_reaches(
    name: str, make_model: Callable[..., Transformer], make_tokens: Callable[..., Tensor]
) -> None:
    """From a plain model switched to YaRN, as by a phase: 80 tokens of which half lie within the original context, and
    half are spread over all that the factor adds to it, to the last."""
    scaling = EXTENDED[name]
    within, reach = 4096, int(scaling.factor) * 4096
    generator = torch.Generator().manual_seed(0)
    near = torch.randperm(within, generator=generator)[:40]
    far = within + torch.randperm(reach - within - 1, generator=generator)[:39]
    positions = torch.cat((near, far, torch.tensor([reach - 1]))).sort().values
    shape = {"max_position_embeddings": reach, "qk_rope_head_dim": 16, "rope_theta": 50000.0}
    model, tokens = make_model(**shape), make_tokens(2, len(positions))
    tables = model.rope_tables
    model.rope_tables = lambda _, device: tuple(t[positions] for t in tables(reach, device))  # type: ignore[assignment, method-assign]
    plain = model.logits(tokens)
    model.set_rope_scaling(scaling)
    expected = to_transformers(model)(input_ids=tokens, position_ids=positions[None]).logits
    assert (model.logits(tokens) - expected).abs().max() <= 1e-5
    assert (model.logits(tokens) - plain).abs().max() > 1e-2
