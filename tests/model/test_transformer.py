from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from k2train.config import ModelConfig
from k2train.model import ExpertParallel, MoE, Transformer, build_model

MakeModel = Callable[..., Transformer]
MakeTokens = Callable[..., torch.Tensor]


def test_roles_are_complete(make_model: MakeModel) -> None:
    model = make_model()
    roles = model.parameter_roles()
    assert set(roles) == {name for name, _ in model.named_parameters()}
    assert roles["layers.0.self_attn.kv_a_layernorm.weight"] == "norm"
    assert roles["layers.1.mlp.shared_experts.up_proj.weight"] == "mlp"
    per_layer = {"attention": 5, "norm": 4}
    assert Counter(roles.values()) == {
        "embedding": 1,
        "head": 1,
        "attention": 3 * per_layer["attention"],
        "norm": 3 * per_layer["norm"] + 1,
        "mlp": 3 + 2 * 3,
        "expert": 2 * 3,
        "router": 2,
    }


def test_roles_of_a_tied_model(make_model: MakeModel) -> None:
    model = make_model(tie_word_embeddings=True)
    assert set(model.parameter_roles()) == {name for name, _ in model.named_parameters()}
    assert "head" not in model.parameter_roles().values()


def test_layers_have_their_global_names(make_model: MakeModel) -> None:
    model = make_model()
    assert [name for name, _ in model.attention_layers()] == [f"layers.{i}.self_attn" for i in range(3)]
    assert [name for name, _ in model.moe_layers()] == ["layers.1.mlp", "layers.2.mlp"]
    assert sorted(name for name, _ in model.moe_layers()[0][1].experts.named_parameters()) == ["w1", "w2", "w3"]


def test_loads_are_counted_in_training_alone(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model, tokens = make_model(), make_tokens(2, 15)
    model.eval()(tokens, tokens)
    model.logits(tokens)
    assert all(not moe.gate.loads.any() for _, moe in model.moe_layers())
    model.train()
    for _ in range(2):
        model(tokens, tokens)
    for _, moe in model.moe_layers():
        assert moe.gate.loads.dtype == torch.int64
        assert moe.gate.loads.sum() == 2 * 30 * 2  # micro-batches x tokens x experts of each
    saved = model.state_dict()
    assert not [name for name in saved if name.endswith(("loads", "max_logits"))]
    assert "layers.1.mlp.gate.e_score_correction_bias" in saved


def test_nothing_of_the_future_is_seen(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model, tokens = make_model().eval(), make_tokens(1, 20)
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 61
    one, other = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(one[:, :12], other[:, :12], atol=1e-6, rtol=0)
    assert (one[:, 12:] != other[:, 12:]).any()


def test_loss_is_that_of_the_logits(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model, tokens, labels = make_model(), make_tokens(3, 11), make_tokens(3, 11, seed=1)
    labels[1, 3:] = -100
    loss, balance = model(tokens, labels)
    assert loss.shape == (3, 11)
    assert loss.dtype == balance.dtype == torch.float32
    log_probabilities = model.logits(tokens).double().log_softmax(-1)
    expected = -log_probabilities.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    torch.testing.assert_close(loss.double(), expected.masked_fill(labels == -100, 0), atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    """Even of experts that no token chose: a rank that skips one in the reduction would stop the others."""
    model, tokens = make_model(), make_tokens(1, 1)
    model(tokens, tokens)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bf16(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    tokens = make_tokens(2, 30)
    narrow, wide = make_model(dtype=torch.bfloat16), make_model()
    bias = narrow.moe_layers()[0][1].gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, wide.moe_layers()[0][1].gate.e_score_correction_bias)
    loss, _ = narrow(tokens, tokens)
    assert loss.dtype == torch.float32
    assert (loss.mean() - wide(tokens, tokens)[0].mean()).abs() < 0.1
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in narrow.parameters())
    cast = make_model()
    bias = cast.moe_layers()[0][1].gate.e_score_correction_bias.clone()
    assert torch.equal(cast.bfloat16().moe_layers()[0][1].gate.e_score_correction_bias, bias)


def test_no_shared_experts_and_no_dense_layers(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model, tokens = make_model(n_shared_experts=0, first_k_dense_replace=0), make_tokens(1, 5)
    loss, _ = model(tokens, tokens)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert "mlp" not in model.parameter_roles().values()


def test_moe_class_may_have_another_parent(config: ModelConfig, make_tokens: MakeTokens) -> None:
    """DeepSpeed's expert layer has a constructor of other arguments, which must not be called, and its own forward."""

    class Foreign(torch.nn.Module):
        def __init__(self, spec: object) -> None:
            raise AssertionError("not ours to call")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("ours must be found first")

    class Both(MoE, Foreign):
        def __init__(self, config: ModelConfig, *, expert_parallel: ExpertParallel | None = None) -> None:
            MoE.__init__(self, config, expert_parallel=expert_parallel)
            self.mark = True

    model, tokens = build_model(config, seed=0, moe_class=Both), make_tokens(1, 5)
    assert torch.equal(model.logits(tokens), build_model(config, seed=0).logits(tokens))
    assert set(model.parameter_roles()) == {name for name, _ in model.named_parameters()}


def test_refusals(config: ModelConfig, make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="161 tokens is longer than max_position_embeddings=160"):
        model.logits(make_tokens(1, 161))
    with pytest.raises(ValueError, match=r"shape \(7,\).*tokens\[None\]"):
        model.logits(make_tokens(7))
    with pytest.raises(ValueError, match="float32"):
        model.logits(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="one label for each token"):
        model(make_tokens(1, 7), make_tokens(1, 6))
    with pytest.raises(ValueError, match="vocab_size=null"):
        build_model(dataclasses.replace(config, vocab_size=None), seed=0)
    with pytest.raises(ValueError, match="n_routed_experts=8 cannot be shared out over 3 processes"):
        build_model(config, seed=0, expert_parallel=ExpertParallel(group=None, size=3, rank=0))
