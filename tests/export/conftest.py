"""Random small architectures of every kind that k2train has."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from k2train.config import ModelConfig, parse


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random_config(seed: int, attention: str) -> ModelConfig:
    """One whose wide initial values make attention and routing far from uniform."""
    draw = random.Random(f"{attention}{seed}")
    layers = draw.randint(1, 4)
    groups = draw.choice([1, 1, 2, 4])
    experts = groups * draw.randint(max(2, -(-4 // groups)), 64 // groups)
    topk_group = draw.randint(1, groups)
    chosen = draw.randint(1, min(8, topk_group * (experts // groups)))
    heads = draw.randint(1, 4)
    values: dict[str, Any] = {
        "vocab_size": 300 + 4 * draw.randint(0, 10),
        "hidden_size": 8 * draw.randint(2, 8),
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw.randint(0, layers),
        "attention": attention,
        "num_attention_heads": heads,
        "num_key_value_heads": None,
        "q_lora_rank": draw.choice([None, draw.randint(5, 30)]),
        "kv_lora_rank": draw.randint(4, 24),
        "qk_nope_head_dim": draw.randint(1, 12),
        "qk_rope_head_dim": 2 * draw.randint(1, 8),
        "v_head_dim": draw.randint(1, 20),
        "intermediate_size": draw.randint(8, 60),
        "moe_intermediate_size": draw.randint(4, 20),
        "n_routed_experts": experts,
        "num_experts_per_tok": chosen,
        "n_shared_experts": draw.randint(0, 2),
        "n_group": groups,
        "topk_group": topk_group,
        "norm_topk_prob": chosen == 1 or draw.random() < 0.8,
        "routed_scaling_factor": draw.choice([1.0, 2.5, 2.827]),
        "max_position_embeddings": draw.choice([128, 256]),
        "rope_theta": draw.choice([10000.0, 50000.0]),
        "rope_scaling": None,
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "tie_word_embeddings": draw.random() < 0.3,
        "initializer_scheme": "normal",
        "initializer_range": 0.1,
        "router_bias_rate": 1e-3,
        "balance_loss_weight": 0.0,
    }
    if draw.random() < 0.5:
        same = draw.choice([0.0, 0.7, 1.0])
        values["rope_scaling"] = {
            "factor": draw.choice([2.0, 8.0, 32.0]),
            "original_max_position_embeddings": 32,
            "beta_fast": draw.choice([1.0, 4.0, 32.0]),
            "beta_slow": 1.0,
            "mscale": draw.choice([1.0, same]),
            "mscale_all_dim": same,
        }
    if attention == "gqa":
        d = values["qk_rope_head_dim"]
        plain = values["first_k_dense_replace"] == layers  # Llama: all of a head is rotated
        nope = 0 if plain else draw.choice([0, values["qk_nope_head_dim"]])
        shared = draw.choice([k for k in range(1, heads + 1) if heads % k == 0])
        values |= {"q_lora_rank": None, "kv_lora_rank": None, "qk_nope_head_dim": nope, "v_head_dim": d + nope}
        values["num_key_value_heads"] = shared
        if values["rope_scaling"]:
            values["rope_scaling"] |= {"mscale": 0.0, "mscale_all_dim": 0.0}
    return parse(ModelConfig, values)


@pytest.fixture
def make_config() -> Any:
    return random_config
