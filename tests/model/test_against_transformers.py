"""The outside truth: transformers' DeepseekV3ForCausalLM with the same weights gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from k2train.config import ModelConfig, RopeScalingConfig
from k2train.model import Transformer

transformers = pytest.importorskip("transformers")

YARN = RopeScalingConfig(
    factor=8.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.7
)
K2_YARN = RopeScalingConfig(
    factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
)
VARIANTS: dict[str, dict[str, Any]] = {
    "as_k2": {},
    "no_q_latent": {"q_lora_rank": None},
    "yarn": {"rope_scaling": YARN},
    "yarn_of_k2": {"rope_scaling": K2_YARN, "qk_rope_head_dim": 16, "rope_theta": 50000.0},
    "yarn_without_mscale": {
        "rope_scaling": RopeScalingConfig(
            factor=4.0,
            original_max_position_embeddings=40,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=0.0,
            mscale_all_dim=0.0,
        )
    },
    "groups": {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "two_dense_two_shared": {"num_hidden_layers": 4, "first_k_dense_replace": 2, "n_shared_experts": 2},
    "all_dense": {"first_k_dense_replace": 3},
    "tied": {"tie_word_embeddings": True},
    "weights_not_normalised": {"norm_topk_prob": False},
    "odd_sizes": {"hidden_size": 33, "num_attention_heads": 5, "v_head_dim": 13, "moe_intermediate_size": 11},
    "values_wider_than_keys": {"v_head_dim": 24, "num_experts_per_tok": 1},
}


def hf_config(config: ModelConfig) -> Any:
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        rope |= {"rope_type": "yarn"} | {
            name: getattr(scaling, name)
            for name in (
                "factor",
                "original_max_position_embeddings",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
            )
        }
    same = {
        name: getattr(config, name)
        for name in ModelConfig.__dataclass_fields__
        if name not in ("rope_theta", "rope_scaling", "router_bias_rate", "balance_loss_weight")
    }
    return transformers.DeepseekV3Config(
        **same,
        num_key_value_heads=config.num_attention_heads,
        rope_parameters=rope,
        attn_implementation="eager",
        experts_implementation="eager",
    )


def hf_name(name: str, tensors: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor] | None:
    """Where one of our tensors lies in transformers' model; None for w3, which lies beside w1."""
    if name.endswith("experts.w3"):
        return None
    tensor = tensors[name]
    if name.endswith("experts.w1"):
        name, tensor = (
            name.replace("experts.w1", "experts.gate_up_proj"),
            torch.cat((tensor, tensors[name[:-1] + "3"]), 1),
        )
    name = name.replace("experts.w2", "experts.down_proj")
    return (name if name.startswith("lm_head") else f"model.{name}"), tensor


def to_transformers(model: Transformer) -> Any:
    theirs = transformers.DeepseekV3ForCausalLM(hf_config(model.config))
    ours = model.state_dict()
    state = dict(pair for name in ours if (pair := hf_name(name, ours)) is not None)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} if model.config.tie_word_embeddings else not missing
    assert not unexpected
    theirs.tie_weights()
    return theirs.train()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients(
    variant: str, make_model: Callable[..., Transformer], make_tokens: Callable[..., torch.Tensor]
) -> None:
    model = make_model(**VARIANTS[variant])
    theirs = to_transformers(model)
    tokens, labels = make_tokens(2, 137), make_tokens(2, 137, seed=1)  # more than one block of attention rows
    labels[0, :9] = -100

    logits = theirs(input_ids=tokens).logits
    assert (model.logits(tokens) - logits).abs().max() <= 1e-5
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 137)
    loss, balance = model(tokens, labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    assert balance == 0

    scale = torch.rand(2, 137, generator=torch.Generator().manual_seed(2))
    (loss * scale).sum().backward()
    (expected * scale).sum().backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in ours:
        if (pair := hf_name(name, ours)) is not None:
            expected_grad = wanted[pair[0]]
            assert (pair[1] - expected_grad).abs().max() <= 1e-5 * (1 + expected_grad.abs().max()), name
