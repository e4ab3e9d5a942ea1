"""The attention module and QK-Clip's protocol on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from k2train.model import LatentAttention, Transformer
from k2train.model.max_logits import CANDIDATES
from k2train.model.rope import rope_frequencies, rope_table

MakeModel = Callable[..., Transformer]


def first_attention(model: Transformer) -> tuple[LatentAttention, torch.Tensor, torch.Tensor]:
    cos, sin = rope_table(rope_frequencies(6, theta=10000.0, scaling=None), 40, scaling=None)
    return model.attention_layers()[0][1], cos, sin


def hidden(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 40, 36, generator=torch.Generator().manual_seed(seed)).to(dtype)


def brute_force(layer: LatentAttention, x: torch.Tensor) -> torch.Tensor:
    """Largest visible logit of each head in float64, from the layer's weights alone."""
    w = {name: p.detach().double() for name, p in layer.named_parameters()}
    x = x.double()

    def norm(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)

    if layer.q_compressed:
        q = norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"]) @ w["q_b_proj.weight"].T
    else:
        q = x @ w["q_proj.weight"].T
    kv = x @ w["kv_a_proj_with_mqa.weight"].T
    up = norm(kv[..., :12], w["kv_a_layernorm.weight"]) @ w["kv_b_proj.weight"].T
    q, up, rope = q.view(2, 40, 3, 16), up.view(2, 40, 3, 17), kv[..., 12:]
    turn = torch.polar(
        torch.ones(40, 3, dtype=torch.float64),
        torch.outer(torch.arange(40.0), 10000.0 ** (-torch.arange(0, 6, 2) / 6)).double(),
    )

    def turned(y: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (3, 2)).contiguous()) * turn).flatten(-2)

    q, k = q.transpose(1, 2), up.transpose(1, 2)[..., :10]
    logits = q[..., :10] @ k.transpose(-1, -2) + turned(q[..., 10:]) @ turned(rope)[:, None].transpose(-1, -2)
    visible = torch.ones(40, 40).tril().bool()
    return (logits * 16**-0.5).masked_fill(~visible, float("-inf")).amax((0, 2, 3))


@pytest.mark.parametrize("q_lora_rank", [20, None])
def test_max_logits_accumulate_over_micro_batches(make_model: MakeModel, q_lora_rank: int | None) -> None:
    layer, cos, sin = first_attention(make_model(q_lora_rank=q_lora_rank))
    assert layer.max_logits.tolist() == [float("-inf")] * 3
    expected = torch.full((3,), float("-inf"), dtype=torch.float64)
    for seed in range(3):
        layer(hidden(seed), cos, sin)
        expected = torch.maximum(expected, brute_force(layer, hidden(seed)))
        torch.testing.assert_close(layer.max_logits.double(), expected, atol=1e-5, rtol=1e-5)
    assert not layer.max_logits.requires_grad
    layer.reset_max_logits()
    layer(hidden(1), cos, sin)
    torch.testing.assert_close(layer.max_logits.double(), brute_force(layer, hidden(1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("q_lora_rank", [20, None])
def test_a_clipped_head_has_exactly_tau(make_model: MakeModel, q_lora_rank: int | None, alpha: float) -> None:
    """With the layer's input held fixed, the head's maximum after the clip is min(S, tau)."""
    layer, cos, sin = first_attention(make_model(q_lora_rank=q_lora_rank))
    layer(hidden(), cos, sin)
    before, weights = layer.max_logits, {name: p.detach().clone() for name, p in layer.named_parameters()}
    tau = before.median().item()  # one head above, one at, one below
    gamma = (tau / before).clamp(max=1)
    with torch.no_grad():
        for parameter, scale in layer.row_scales(gamma, alpha=alpha):
            assert scale.shape == parameter.shape[:1]
            parameter *= scale[:, None]
    layer.reset_max_logits()
    layer(hidden(), cos, sin)
    torch.testing.assert_close(layer.max_logits, before.clamp(max=tau), atol=1e-5, rtol=1e-5)
    # Rows of untouched heads, of values and of the shared rope key keep every bit.
    head = int(before.argmin())
    for name, parameter in layer.named_parameters():
        if name in ("q_b_proj.weight", "q_proj.weight", "kv_b_proj.weight"):
            old, new = weights[name].unflatten(0, (3, -1)), parameter.unflatten(0, (3, -1))
            assert torch.equal(old[head], new[head])
            if name == "kv_b_proj.weight":
                assert torch.equal(old[:, 10:], new[:, 10:])
            else:
                assert not torch.equal(old, new)
        else:
            assert torch.equal(weights[name], parameter)


def test_gamma_of_one_scales_by_exactly_one(make_model: MakeModel) -> None:
    layer, _, _ = first_attention(make_model())
    for _, scale in layer.row_scales(torch.ones(3)):
        assert (scale == 1).all()
        assert scale.dtype == torch.float32


def test_evaluation_counts_nothing(make_model: MakeModel) -> None:
    layer, cos, sin = first_attention(make_model())
    layer.eval()(hidden(), cos, sin)
    assert layer.max_logits.tolist() == [float("-inf")] * 3


def test_nan_shows(make_model: MakeModel) -> None:
    layer, cos, sin = first_attention(make_model())
    x = hidden()
    x[0, 3] = float("nan")
    layer(x, cos, sin)
    layer(hidden(), cos, sin)  # and is not forgotten by the next micro-batch
    assert layer.max_logits.isnan().all()


def test_max_logits_stay_fp32_in_a_bf16_model(make_model: MakeModel) -> None:
    layer, cos, sin = first_attention(make_model().bfloat16())
    assert layer.o_proj.weight.dtype == torch.bfloat16
    layer(hidden(dtype=torch.bfloat16), cos, sin)
    assert layer.max_logits.dtype == torch.float32
    assert not torch.equal(layer.max_logits, layer.max_logits.bfloat16().float())


@pytest.mark.parametrize("backend", ["block", "flash_cpu", "math"])
def test_documents_do_not_see_each_other(make_model: MakeModel, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and maxima of the documents in one row are those of each by itself at its positions."""
    monkeypatch.setattr("k2train.model.causal.choose_backend", lambda *_, **__: backend)
    layer, cos, sin = first_attention(make_model())
    layer.exact_above = float("-inf")
    starts = torch.where(torch.arange(40) < 25, 0, 25).expand(2, -1)
    together, maxima = layer(hidden(), cos, sin, starts), layer.max_logits
    layer.reset_max_logits()
    apart = [layer(hidden()[:, part], cos[part], sin[part]) for part in (slice(0, 25), slice(25, 40))]
    torch.testing.assert_close(together, torch.cat(apart, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(maxima, layer.max_logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(layer(hidden(), cos, sin), together, atol=1e-3)


def test_fallbacks_are_counted_until_the_reset(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k2train.model.causal.choose_backend", lambda *_, **__: "flash_cpu")
    layer, cos, sin = first_attention(make_model().bfloat16().float())
    assert layer.max_logit_fallbacks.dtype == torch.int64
    with torch.no_grad():
        layer.kv_b_proj.weight.zero_()  # flat heads: no row can be ruled out
        layer.kv_a_proj_with_mqa.weight[12:] = 0.0
    for passes in (1, 2):
        layer(hidden(), cos, sin)
        assert layer.max_logit_fallbacks.item() == 0, passes  # healthy: the bound is below 20
    assert (layer.max_logits - torch.tensor(40 - CANDIDATES).log()).abs().max() < 1e-5
    layer.reset_max_logits()
    layer.exact_above = 1.0
    for passes in (1, 2):
        layer(hidden(), cos, sin)
        assert layer.max_logit_fallbacks.item() == 3 * passes
    assert layer.max_logits.tolist() == [0.0] * 3
    layer.reset_max_logits()
    assert layer.max_logit_fallbacks.item() == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_not_counted(
    make_model: MakeModel, make_tokens: Callable[..., torch.Tensor], use_reentrant: bool
) -> None:
    """Max logits, loads and gradients under activation checkpointing are those without."""
    tokens, results = make_tokens(2, 30), []
    for recompute in (False, True):
        model = make_model()
        if recompute:
            for layer in model.layers:
                run = layer.forward
                layer.forward = lambda *inputs, run=run: checkpoint(run, *inputs, use_reentrant=use_reentrant)
        loss, _ = model(tokens, tokens)
        loss.sum().backward()
        results.append(
            [layer.max_logits for _, layer in model.attention_layers()]
            + [moe.gate.loads for _, moe in model.moe_layers()]
            + [parameter.grad for parameter in model.parameters()]
        )
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_the_kernel_has_a_name(make_model: MakeModel) -> None:
    (_, layer), *_ = make_model().attention_layers()
    assert layer.backend(64) == "block"
    assert layer.to("meta").backend(64) == "math"
