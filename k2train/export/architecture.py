"""``config.json`` as others read it, and our ``ModelConfig``: one to the other. Pure: no torch.

Latent attention is DeepSeek-V3's architecture (``model_type`` deepseek_v3, or kimi_k2 in Kimi K2's own release),
grouped queries are Glm4Moe's, and Llama's where no layer has experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from k2train.config import ConfigError, ModelConfig, RopeScalingConfig, parse


class ExportError(ValueError):
    """What cannot be written in, or read from, the released layout, and why."""


CLASSES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}
# Fields of ModelConfig that config.json has under the same name.
COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
EXPERTS = (
    "first_k_dense_replace",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)
# Of a model without experts, as ModelConfig asks for them.
NO_EXPERTS = {
    "moe_intermediate_size": 1,
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
# What the architecture has only one of, where config.json has a choice; others are refused.
FIXED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "attention_bias": False,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "glm4_moe": {"attention_bias": False, "hidden_act": "silu", "use_qk_norm": False},
    "llama": {"attention_bias": False, "hidden_act": "silu", "mlp_bias": False},
}
FIXED["kimi_k2"] = FIXED["deepseek_v3"]


def released_config(config: ModelConfig, *, dtype: str, end_of_text: int) -> dict[str, Any]:
    """The ``config.json`` of a model.

    Positions are said twice, as transformers reads them since version 5 (``rope_parameters``) and as older ones, vLLM
    and K2's release have them (``rope_theta``, ``rope_scaling``).

    Args:
        config: the architecture as it was trained, with its vocabulary.
        dtype: of the weights, as torch names it.
        end_of_text: the token that opens and closes each document.

    Raises:
        ExportError: there is no class of others for it.
    """
    model_type = _model_type(config)
    found: dict[str, Any] = {"architectures": [CLASSES[model_type]], "model_type": model_type}
    found |= {name: getattr(config, name) for name in COMMON}
    found |= FIXED[model_type]
    if model_type == "deepseek_v3":
        found |= {name: getattr(config, name) for name in (*LATENT, *EXPERTS)}
        found |= {"num_key_value_heads": config.num_attention_heads, "num_nextn_predict_layers": 0, "ep_size": 1}
    else:
        found |= {"head_dim": config.v_head_dim, "num_key_value_heads": config.num_key_value_heads}
        if model_type == "glm4_moe":
            found |= {name: getattr(config, name) for name in EXPERTS} | {"num_nextn_predict_layers": 0}
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope = {"rope_type": "yarn", **asdict(scaling)}
        if not scaling.mscale_all_dim:  # then nobody reads mscale, but for those whose default for it is another
            del rope["mscale"], rope["mscale_all_dim"]
    partial = {}
    if model_type == "glm4_moe":
        partial = {"partial_rotary_factor": _share(config.qk_rope_head_dim, config.v_head_dim)}
    found |= {"rope_theta": config.rope_theta, **partial}
    found["rope_scaling"] = None if scaling is None else {"type": "yarn", **rope}
    found["rope_parameters"] = {"rope_theta": config.rope_theta, **rope, **partial}
    found |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": None}
    return found | {"dtype": dtype, "torch_dtype": dtype, "use_cache": True, "attention_dropout": 0.0}


def own_config(released: Mapping[str, Any], *, defaults: ModelConfig) -> ModelConfig:
    """The inverse of ``released_config``.

    Args:
        released: a ``config.json``.
        defaults: for what no release states: how weights begin, and the balancing of experts.

    Raises:
        ExportError: it is of another architecture; the sentence names the key.
    """
    model_type = released.get("model_type")
    if model_type not in CLASSES:
        raise ExportError(f"config.json: model_type={model_type!r} is none of {', '.join(CLASSES)}, which k2train has")
    for key, only in FIXED[model_type].items():
        if (value := released.get(key, only)) != only:
            raise ExportError(f"config.json: {key}={value!r}, and k2train's models have {only!r} alone")
    values = {name: getattr(defaults, name) for name in ("initializer_scheme", *_TRAINING)}
    values |= {name: _take(released, name) for name in COMMON if name != "tie_word_embeddings"}
    values["tie_word_embeddings"] = released.get("tie_word_embeddings", False)
    has_experts = model_type != "llama"
    values |= {name: _take(released, name) for name in EXPERTS} if has_experts else NO_EXPERTS
    if not has_experts:
        values["first_k_dense_replace"] = values["num_hidden_layers"]
    if values["n_shared_experts"] is None:
        values["n_shared_experts"] = 0
    rope = _rope(released)
    if FIXED[model_type] is FIXED["deepseek_v3"]:
        values |= {name: _take(released, name) for name in LATENT} | {"attention": "mla", "num_key_value_heads": None}
    else:
        heads = values["num_attention_heads"]
        head = released.get("head_dim") or values["hidden_size"] // heads
        default = 0.5 if model_type == "glm4_moe" else 1.0
        rotated = int(head * rope.get("partial_rotary_factor", released.get("partial_rotary_factor", default)))
        values |= {"attention": "gqa", "q_lora_rank": None, "kv_lora_rank": None, "v_head_dim": head}
        values |= {"qk_nope_head_dim": head - rotated, "qk_rope_head_dim": rotated}
        values["num_key_value_heads"] = released.get("num_key_value_heads") or heads
    values |= {"rope_theta": rope["rope_theta"], "rope_scaling": _scaling(rope)}
    try:
        config = parse(ModelConfig, values)
        _model_type(config)
    except ConfigError as error:
        raise ExportError(f"config.json: {error.faults[0]}") from error
    return config


_TRAINING = ("router_bias_rate", "balance_loss_weight")


def _model_type(config: ModelConfig) -> str:
    """Of the class that computes what ours does."""
    if config.attention == "mla":
        return "deepseek_v3"
    name = "Glm4Moe" if config.has_experts else "Llama"
    reason = None
    if config.v_head_dim != config.qk_nope_head_dim + config.qk_rope_head_dim:
        reason = f"model.v_head_dim={config.v_head_dim} is another size than that of its queries and keys"
    elif config.qk_nope_head_dim and not config.has_experts:
        reason = f"model.qk_nope_head_dim={config.qk_nope_head_dim}, and Llama rotates all of a head"
    elif config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        reason = "model.rope_scaling.mscale_all_dim changes the scale of the softmax, as in DeepSeek's models alone"
    if reason:
        raise ExportError(f"there is no class of transformers for this model with grouped queries ({name}): {reason}")
    return "glm4_moe" if config.has_experts else "llama"


def _share(part: int, whole: int) -> float:
    """A number by which readers, who cut off what is behind the point, get ``part`` of ``whole``."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 1)


def _take(released: Mapping[str, Any], name: str) -> Any:
    if name not in released:
        raise ExportError(f"config.json lacks {name}, without which the model's shape is not known")
    return released[name]


def _rope(released: Mapping[str, Any]) -> dict[str, Any]:
    """Positions in the new style, whichever the file has."""
    rope = dict(released.get("rope_parameters") or released.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", released.get("rope_theta", 10000.0))
    return rope


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] != "yarn":
        raise ExportError(f"config.json: rope_type={rope['rope_type']!r}, and k2train extends positions by yarn alone")
    if rope.get("attention_factor") is not None or rope.get("truncate") is False:
        raise ExportError("config.json: attention_factor and truncate of yarn are not what k2train computes")
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
    names = RopeScalingConfig.__dataclass_fields__
    return defaults | {name: _take(rope, name) for name in names if name in rope or name not in defaults}
