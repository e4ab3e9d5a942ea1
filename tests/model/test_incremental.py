"""Token by token what the full forward pass gives, from a memory of the size that latent attention promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from k2train.config import ModelConfig, RopeScalingConfig
from k2train.model import Incremental, Transformer

YARN = RopeScalingConfig(
    factor=8.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.7
)
GQA = {"attention": "gqa", "num_attention_heads": 6, "num_key_value_heads": 2, "q_lora_rank": None}
GQA |= {"kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 10, "v_head_dim": 10}
LLAMA = {**GQA, "first_k_dense_replace": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "as_k2": {},
    "no_q_latent": {"q_lora_rank": None},
    "yarn": {"rope_scaling": YARN},
    "groups_tied": {"n_group": 2, "topk_group": 1, "tie_word_embeddings": True},
    "gqa": GQA,
    "gqa_partly_rotated": {**GQA, "qk_nope_head_dim": 6, "v_head_dim": 16},
    "llama": LLAMA,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_token_as_in_the_full_pass(
    variant: str, make_model: Callable[..., Transformer], make_tokens: Callable[..., Tensor]
) -> None:
    model = make_model(**VARIANTS[variant]).eval()
    tokens = make_tokens(3, 40)
    with torch.no_grad():
        expected = model.logits(tokens)
    rows = Incremental(model, rows=3, room=40)
    begun = [5, 1, 17]  # rows of different lengths beside each other
    for row, length in enumerate(begun):
        found = rows.begin(row, tokens[row, :length].tolist())
        torch.testing.assert_close(found, expected[row, length - 1], atol=1e-5, rtol=1e-5)
    for step in range(22):
        places = [length + step for length in begun]
        scores = rows.step([int(tokens[row, place]) for row, place in enumerate(places)])
        for row, place in enumerate(places):
            torch.testing.assert_close(scores[row], expected[row, place], atol=1e-5, rtol=1e-5)
    rows.keep([2, 0])
    scores = rows.step([int(tokens[2, 39]), int(tokens[0, 27])])
    torch.testing.assert_close(scores, torch.stack([expected[2, 39], expected[0, 27]]), atol=1e-5, rtol=1e-5)


def test_a_row_can_begin_anew(make_model: Callable[..., Transformer], make_tokens: Callable[..., Tensor]) -> None:
    model, tokens = make_model().eval(), make_tokens(1, 30)
    rows = Incremental(model, rows=1, room=30)
    rows.begin(0, make_tokens(1, 30, seed=1)[0].tolist())
    rows.begin(0, tokens[0, :7].tolist())
    found = rows.step([int(tokens[0, 7])])
    with torch.no_grad():
        torch.testing.assert_close(found[0], model.logits(tokens)[0, 7], atol=1e-5, rtol=1e-5)


def test_bytes_a_token(make_model: Callable[..., Transformer], config: ModelConfig) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rows = Incremental(make_model(dtype=dtype), rows=2, room=50)
        bytes_a_token = sum(memory.untyped_storage().nbytes() for memory in rows.memory) / (2 * 50)
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        assert bytes_a_token == latent * config.num_hidden_layers * dtype.itemsize
    k2 = dataclasses.replace(config, kv_lora_rank=512, qk_rope_head_dim=64)
    assert sum(layer.width for _, layer in Transformer(k2).attention_layers()) == 576 * config.num_hidden_layers
    with pytest.raises(ValueError, match="max_position_embeddings=160"):
        Incremental(make_model(), rows=1, room=161)
