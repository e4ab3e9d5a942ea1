"""RoPE against complex rotations, YaRN against its formulas written out pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

from k2train.config import RopeScalingConfig
from k2train.model.rope import heads, rope_frequencies, rope_table, softmax_scale

YARN = RopeScalingConfig(
    factor=8.0, original_max_position_embeddings=1024, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.5
)


def inputs(dtype: torch.dtype, length: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, 3, 4 + 6), (2, length, 3, 4 + 7), (2, length, 6)]
    return tuple(torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes)


def test_heads_rotate_pairs_and_only_the_rope_part() -> None:
    q, kv, rope = inputs(torch.float64)
    cos, sin = (t.double() for t in rope_table(rope_frequencies(6, theta=100.0, scaling=None), 5, scaling=None))
    turned_q, turned_k, v = heads(q, kv, rope, cos, sin)
    torch.testing.assert_close(turned_q[..., :4], q[..., :4].transpose(1, 2))
    torch.testing.assert_close(turned_k[..., :4], kv[..., :4].transpose(1, 2))
    torch.testing.assert_close(v, kv[..., 4:].transpose(1, 2))
    turn = torch.polar(torch.ones(5, 3, dtype=torch.float64), torch.atan2(sin, cos))
    for got, plain in ((turned_q, q[..., 4:].transpose(1, 2)), (turned_k, rope[:, None].expand(2, 3, 5, 6))):
        pairs = torch.view_as_complex(plain.reshape(2, 3, 5, 3, 2).contiguous()) * turn
        torch.testing.assert_close(got[..., 4:], torch.cat((pairs.real, pairs.imag), -1))


def test_gradients_of_heads() -> None:
    cos, sin = (t.double() for t in rope_table(rope_frequencies(6, theta=100.0, scaling=None), 5, scaling=None))
    assert torch.autograd.gradcheck(lambda q, kv, rope: heads(q, kv, rope, cos, sin), inputs(torch.float64))


def test_logits_depend_on_the_distance_alone() -> None:
    q, kv, rope = inputs(torch.float32, length=9)
    cos, sin = rope_table(rope_frequencies(6, theta=100.0, scaling=None), 9, scaling=None)
    same = [t.detach()[:, :1].expand(-1, 9, *t.shape[2:]) for t in (q, kv, rope)]
    turned_q, turned_k, _ = heads(*same, cos, sin)
    logits = turned_q @ turned_k.transpose(-1, -2)
    torch.testing.assert_close(logits[..., 1:, 1:], logits[..., :-1, :-1], atol=1e-5, rtol=1e-5)


def test_yarn_frequencies() -> None:
    dim, theta = 16, 10000.0
    got = rope_frequencies(dim, theta=theta, scaling=YARN).double()

    def pair(turns: float) -> float:
        return dim * math.log(1024 / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = math.floor(pair(32.0)), math.ceil(pair(1.0))
    for i, frequency in enumerate(got.tolist()):
        plain = theta ** (-2 * i / dim)
        slow = min(max((i - low) / (high - low), 0.0), 1.0)
        assert frequency == pytest.approx(plain * (1 - slow) + plain / 8 * slow, rel=1e-5)
    assert got[0] == 1.0  # turns often: as trained
    assert got[-1] == pytest.approx(theta ** (-14 / 16) / 8, rel=1e-5)  # turns seldom: slowed down


def test_yarn_temperatures() -> None:
    plain, cos = softmax_scale(24, None), rope_table(torch.zeros(1), 1, scaling=YARN)[0]
    assert plain == pytest.approx(24**-0.5)
    half = 0.1 * 0.5 * math.log(8) + 1
    assert softmax_scale(24, YARN) == pytest.approx(plain * half**2)
    assert cos.item() == pytest.approx((0.1 * math.log(8) + 1) / half)
    # Kimi K2's: mscale = mscale_all_dim, so that only the softmax is scaled, by 1.81.
    k2 = RopeScalingConfig(
        factor=32.0, original_max_position_embeddings=4096, beta_fast=1, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
    )
    assert softmax_scale(24, k2) / plain == pytest.approx(1.8133, abs=1e-4)
    assert rope_table(torch.zeros(1), 1, scaling=k2)[0].item() == 1.0
