"""A small model that all tests of k2train.model share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from k2train.config import ModelConfig
from k2train.model import Transformer, build_model

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=36,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    attention="mla",
    num_attention_heads=3,
    num_key_value_heads=None,
    q_lora_rank=20,
    kv_lora_rank=12,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=7,
    intermediate_size=50,
    moe_intermediate_size=18,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    max_position_embeddings=160,
    rope_theta=10000.0,
    rope_scaling=None,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    initializer_scheme="normal",
    initializer_range=0.1,  # large enough that attention and routing are far from uniform
    router_bias_rate=1e-3,
    balance_loss_weight=0.0,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def config() -> ModelConfig:
    return TINY


@pytest.fixture
def make_model(config: ModelConfig) -> Callable[..., Transformer]:
    """Builds the small model with changes to its config; norms and router biases are away from their neutral start."""

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
        model = build_model(dataclasses.replace(config, **changes), seed=seed, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
            for _, moe in model.moe_layers():
                bias = moe.gate.e_score_correction_bias
                bias += 0.05 * torch.randn(bias.shape, generator=generator)
        return model

    return make


@pytest.fixture
def make_tokens() -> Callable[..., torch.Tensor]:
    """Random token ids of the small model's vocabulary."""

    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))

    return make
