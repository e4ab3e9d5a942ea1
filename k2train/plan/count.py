"""Parameters and multiply-adds of a model, from its config alone.

Shapes: D model, H heads, N and R dims of a query or key head without and with position, V dims of a value head, E
experts, K experts a token, I intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from k2train.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the whole model: of experts, the stack of all."""

    name: str
    role: str
    shape: Shape

    @cached_property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@cache
def parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter, in the order of ``Transformer.named_parameters``, which is that of flat tensors.

    Follows ``k2train.model``: DeepSeek-V3's architecture (arXiv 2412.19437, section 2.1) with K2's sizes.
    """
    assert model.vocab_size is not None
    D = model.hidden_size
    found = [Parameter("embed_tokens.weight", "embedding", (model.vocab_size, D))]
    for number in range(model.num_hidden_layers):
        prefix = f"layers.{number}"
        found.append(Parameter(f"{prefix}.input_layernorm.weight", "norm", (D,)))
        found += _attention(model, f"{prefix}.self_attn")
        found.append(Parameter(f"{prefix}.post_attention_layernorm.weight", "norm", (D,)))
        dense = number < model.first_k_dense_replace
        found += _mlp(f"{prefix}.mlp", D, model.intermediate_size) if dense else _experts(model, f"{prefix}.mlp")
    found.append(Parameter("norm.weight", "norm", (D,)))
    if not model.tie_word_embeddings:
        found.append(Parameter("lm_head.weight", "head", (model.vocab_size, D)))
    return tuple(found)


def _attention(model: ModelConfig, prefix: str) -> Iterator[Parameter]:
    D, H = model.hidden_size, model.num_attention_heads
    width = model.qk_nope_head_dim + model.qk_rope_head_dim

    def matrix(name: str, rows: int, columns: int) -> Parameter:
        return Parameter(f"{prefix}.{name}.weight", "attention", (rows, columns))

    if model.attention == "gqa":
        assert model.num_key_value_heads is not None  # ModelConfig.check
        yield matrix("q_proj", H * width, D)
        yield matrix("k_proj", model.num_key_value_heads * width, D)
        yield matrix("v_proj", model.num_key_value_heads * model.v_head_dim, D)
    else:
        assert model.kv_lora_rank is not None
        if model.q_lora_rank is None:
            yield matrix("q_proj", H * width, D)
        else:
            yield matrix("q_a_proj", model.q_lora_rank, D)
            yield Parameter(f"{prefix}.q_a_layernorm.weight", "norm", (model.q_lora_rank,))
            yield matrix("q_b_proj", H * width, model.q_lora_rank)
        yield matrix("kv_a_proj_with_mqa", model.kv_lora_rank + model.qk_rope_head_dim, D)
        yield Parameter(f"{prefix}.kv_a_layernorm.weight", "norm", (model.kv_lora_rank,))
        yield matrix("kv_b_proj", H * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank)
    yield matrix("o_proj", D, H * model.v_head_dim)


def _mlp(prefix: str, D: int, inner: int) -> Iterator[Parameter]:
    for name, shape in (("gate_proj", (inner, D)), ("up_proj", (inner, D)), ("down_proj", (D, inner))):
        yield Parameter(f"{prefix}.{name}.weight", "mlp", shape)


def _experts(model: ModelConfig, prefix: str) -> Iterator[Parameter]:
    D, E, inner = model.hidden_size, model.n_routed_experts, model.moe_intermediate_size
    yield Parameter(f"{prefix}.gate.weight", "router", (E, D))
    for name, shape in (("w1", (E, inner, D)), ("w2", (E, D, inner)), ("w3", (E, inner, D))):
        yield Parameter(f"{prefix}.experts.{name}", "expert", shape)
    if model.n_shared_experts:
        yield from _mlp(f"{prefix}.shared_experts", D, model.n_shared_experts * inner)


def total(found: Sequence[Parameter]) -> int:
    """Parameters in all."""
    return sum(p.elements for p in found)


def active(found: Sequence[Parameter], model: ModelConfig) -> int:
    """Parameters that are used for a token: of the experts K of E, of the rest all."""
    experts = sum(p.elements for p in found if p.role == "expert")
    return total(found) - experts + experts * model.num_experts_per_tok // model.n_routed_experts


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a forward pass for one token; a multiply-add is two."""

    attention: int  # projections around attention
    logits: float  # queries with keys, and probabilities with values
    dense: int  # feed-forward of dense layers, shared experts and routers
    experts: int  # routed
    head: int

    @property
    def forward(self) -> float:
        """In all."""
        return self.attention + self.logits + self.dense + self.experts + self.head

    @property
    def training(self) -> float:
        """Forward and backward: a product's backward pass is two products as large as it (arXiv 2001.08361, 2.1)."""
        return 3 * self.forward


def causal_keys(length: int) -> float:
    """Keys that a token of a sequence sees, in the mean: itself and all before it."""
    return (length + 1) / 2


@cache
def work(model: ModelConfig, *, keys: float) -> Work:
    """What a token costs.

    Each matrix costs two operations an element for each token that it is applied to: all but the embedding, which is
    looked up, the experts K of E times. Attention costs ``2 H (N + R + V)`` for each key that a query sees (PaLM, arXiv
    2204.02311, appendix B). Norms, softmax and SwiGLU are no products and count for nothing here.

    Args:
        model: its architecture.
        keys: that a token attends to, in the mean; see ``causal_keys``.
    """
    found = parameters(model)

    def matrices(*roles: str) -> int:
        return 2 * sum(p.elements for p in found if p.role in roles)

    widths = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    return Work(
        attention=matrices("attention"),
        logits=2 * model.num_hidden_layers * model.num_attention_heads * widths * keys,
        dense=matrices("mlp", "router"),
        experts=matrices("expert") * model.num_experts_per_tok // model.n_routed_experts,
        head=matrices("embedding" if model.tie_word_embeddings else "head"),
    )
