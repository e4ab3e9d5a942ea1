"""Grouped-query attention: its largest logits, and QK-Clip's protocol where heads share keys and where they do not.

Outputs and gradients are held against transformers in test_against_transformers.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from k2train.model import GroupedQueryAttention, Transformer
from k2train.model.grouped_query import rotate_half
from k2train.model.rope import rope_frequencies, rope_table

MakeModel = Callable[..., Transformer]
HEADS, NOPE, ROPE, LENGTH = 6, 4, 6, 40


def first_attention(make_model: MakeModel, *, key_heads: int) -> tuple[GroupedQueryAttention, Tensor, Tensor]:
    sizes = {"qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "q_lora_rank": None, "kv_lora_rank": None}
    model = make_model(attention="gqa", num_attention_heads=HEADS, num_key_value_heads=key_heads, **sizes)
    (_, layer), *_ = model.attention_layers()
    assert isinstance(layer, GroupedQueryAttention)
    return layer, *rope_table(rope_frequencies(ROPE, theta=10000.0, scaling=None), LENGTH, scaling=None)


def hidden(seed: int = 0) -> Tensor:
    return torch.randn(2, LENGTH, 36, generator=torch.Generator().manual_seed(seed))


def brute_force(layer: GroupedQueryAttention, x: Tensor, *, key_heads: int) -> Tensor:
    """Largest visible logit of each head in float64, from the layer's weights alone; pairs turn as complex numbers."""
    frequencies = 10000.0 ** (-torch.arange(0, ROPE, 2, dtype=torch.float64) / ROPE)
    angles = torch.arange(LENGTH, dtype=torch.float64)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)

    def turned(y: Tensor) -> Tensor:
        pairs = torch.complex(y[..., : ROPE // 2], y[..., ROPE // 2 : ROPE]) * turn
        return torch.cat((pairs.real, pairs.imag, y[..., ROPE:]), -1)

    q = (x.double() @ layer.q_proj.weight.double().T).view(2, LENGTH, HEADS, -1).transpose(1, 2)
    k = (x.double() @ layer.k_proj.weight.double().T).view(2, LENGTH, key_heads, -1).transpose(1, 2)
    visible = torch.ones(LENGTH, LENGTH).tril().bool()
    largest = []
    for head in range(HEADS):
        logits = turned(q[:, head]) @ turned(k[:, head * key_heads // HEADS]).transpose(1, 2)
        largest.append((logits * (NOPE + ROPE) ** -0.5)[:, visible].max())
    return torch.stack(largest).detach()


@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_max_logits(make_model: MakeModel, key_heads: int) -> None:
    layer, cos, sin = first_attention(make_model, key_heads=key_heads)
    for seed in (0, 1):
        layer(hidden(seed), cos, sin)
    expected = torch.maximum(*(brute_force(layer, hidden(seed), key_heads=key_heads) for seed in (0, 1)))
    torch.testing.assert_close(layer.max_logits.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_a_clipped_head_has_exactly_tau_and_others_stay(make_model: MakeModel, key_heads: int, alpha: float) -> None:
    layer, cos, sin = first_attention(make_model, key_heads=key_heads)
    layer(hidden(), cos, sin)
    before, weights = layer.max_logits, {name: p.detach().clone() for name, p in layer.named_parameters()}
    tau = before.median().item()  # three heads above, so that some of a shared key's are and some are not
    gamma = (tau / before).clamp(max=1)
    with torch.no_grad():
        for parameter, scale in layer.row_scales(gamma, alpha=alpha):
            assert scale.shape == parameter.shape[:1]
            parameter *= scale[:, None]
    layer.reset_max_logits()
    layer(hidden(), cos, sin)
    torch.testing.assert_close(layer.max_logits, before.clamp(max=tau), atol=1e-5, rtol=1e-5)
    healthy = before <= tau
    assert 0 < healthy.sum() < HEADS
    # None of their weights changed; but a product's rounding may depend on where in memory its operands lie.
    torch.testing.assert_close(layer.max_logits[healthy], before[healthy], atol=0, rtol=1e-6)
    changed = {name for name, parameter in layer.named_parameters() if not torch.equal(parameter, weights[name])}
    if key_heads < HEADS:
        assert changed == {"q_proj.weight"}
    else:
        assert changed == ({"k_proj.weight"} if alpha == 0 else {"q_proj.weight", "k_proj.weight"})


def test_gamma_of_one_scales_by_exactly_one(make_model: MakeModel) -> None:
    for key_heads in (2, 6):
        layer, _, _ = first_attention(make_model, key_heads=key_heads)
        assert all((scale == 1).all() for _, scale in layer.row_scales(torch.ones(HEADS)))


def test_rotation_keeps_the_dtype_and_rounds_once() -> None:
    cos, sin = rope_table(rope_frequencies(ROPE, theta=10000.0, scaling=None), LENGTH, scaling=None)
    x = torch.randn(1, 2, LENGTH, NOPE + ROPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = rotate_half(x, cos, sin)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rotate_half(x.float(), cos, sin).bfloat16())
