"""transformers' models with our configs and weights: the outside truth on names, shapes and numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from k2train.config import ModelConfig
from k2train.export import own_place, released_name, released_shapes

transformers = pytest.importorskip("transformers")
RENAMED = ("attention", "rope_theta", "rope_scaling", "initializer_scheme")
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
TRAINING = ("router_bias_rate", "balance_loss_weight")


def hf_config(config: ModelConfig) -> Any:
    """The config of transformers' model of the same architecture: DeepseekV3, Glm4Moe or, without experts, Llama."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "yarn"} | dataclasses.asdict(config.rope_scaling)
    same = {name: value for name, value in vars(config).items() if name not in (*RENAMED, *TRAINING)}
    same |= {"attn_implementation": "eager", "experts_implementation": "eager", "rope_parameters": rope}
    if config.attention == "mla":
        same["num_key_value_heads"] = config.num_attention_heads
        return transformers.DeepseekV3Config(**same)
    same = {name: value for name, value in same.items() if name not in LATENT}
    same["head_dim"] = config.qk_nope_head_dim + config.qk_rope_head_dim
    assert config.v_head_dim == same["head_dim"], "transformers' heads have one size"
    if not config.has_experts:
        assert not config.qk_nope_head_dim, "Llama rotates all of a head"
        return transformers.LlamaConfig(**same)
    rope["partial_rotary_factor"] = config.qk_rope_head_dim / same["head_dim"]
    return transformers.Glm4MoeConfig(**same, use_qk_norm=False)


def released_layout(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' ``model`` by their names in a released checkpoint, as transformers itself saves them."""
    return transformers.core_model_loading.revert_weight_conversion(model, tensors)


def released_tensors(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of our model (parameters, buffers or gradients) by their released names."""
    places = map(own_place, released_shapes({name: tuple(tensor.shape) for name, tensor in own.items()}))
    return {released_name(p): own[p.name] if p.expert is None else own[p.name][p.expert] for p in places}


def to_transformers(model: torch.nn.Module) -> Any:
    """transformers' model with our weights, which it reads as it reads a released checkpoint."""
    config = hf_config(model.config)
    cls = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    theirs, report = cls.from_pretrained(
        None, config=config, state_dict=released_tensors(model.state_dict()), output_loading_info=True
    )
    assert not any(report.values()), report  # missing, unexpected, mismatched
    return theirs.float().train()
