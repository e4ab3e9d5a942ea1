"""Counts from the config are those of the model."""

import dataclasses
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.cli.options import group_options
from k2train.config import ModelConfig, RunConfig, parse
from k2train.model import build_model
from k2train.plan.count import active, parameters, total, work
from tests.plan.operations import counted_operations


@cache
def model_of(option: str, **changes: object) -> ModelConfig:
    words = [f"model={option}", *(f"model.{key}={value}" for key, value in changes.items())]
    return parse(RunConfig, compose(TRAIN, words)).model


def check(config: ModelConfig) -> None:
    """Names, roles and shapes are those of the model on the meta device, in its order."""
    model = build_model(config, seed=0, device="meta")
    roles = model.parameter_roles()
    assert [(p.name, p.role, p.shape) for p in parameters(config)] == [
        (name, roles[name], tuple(p.shape)) for name, p in model.named_parameters()
    ]


@pytest.mark.parametrize("option", group_options("model", []))
def test_parameters_are_those_of_the_model(option):
    config = model_of(option)
    check(config if config.vocab_size else model_of(option, vocab_size=4096))


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Any architecture that a config may ask for, in small."""
    mla, layers, heads = draw(st.booleans()), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 6]))
    experts = draw(st.integers(1, 9))
    number = st.integers(1, 40)
    config = dataclasses.replace(
        model_of("nano", vocab_size=512),
        vocab_size=draw(st.integers(2, 600)),
        hidden_size=draw(number),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers + 1)),
        attention="mla" if mla else "gqa",
        num_attention_heads=heads,
        num_key_value_heads=None if mla else draw(st.sampled_from([n for n in (1, 2, 3, 6) if heads % n == 0])),
        q_lora_rank=draw(st.none() | number) if mla else None,
        kv_lora_rank=draw(number) if mla else None,
        qk_nope_head_dim=draw(st.integers(1 if mla else 0, 20)),
        qk_rope_head_dim=2 * draw(st.integers(1, 10)),
        v_head_dim=draw(number),
        intermediate_size=draw(number),
        moe_intermediate_size=draw(number),
        n_routed_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        n_shared_experts=draw(st.integers(0, 2)),
        tie_word_embeddings=draw(st.booleans()),
    )
    assume(not list(config.check()))
    return config


@settings(max_examples=25, deadline=None)
@given(models())
def test_parameters_of_any_model(config):
    check(config)


@settings(max_examples=6, deadline=None)
@given(models())
def test_operations_of_any_model(config):
    length = 16
    planned, counted = work(config, keys=length).training, counted_operations(config, batch=2, length=length)
    assert planned == pytest.approx(counted, rel=0.01)


def test_a_tied_head_is_the_embedding():
    config = model_of("nano", vocab_size=512, tie_word_embeddings="true")
    assert total(parameters(config)) == sum(p.numel() for p in build_model(config, seed=0, device="meta").parameters())
    assert work(config, keys=1).head == work(model_of("nano", vocab_size=512), keys=1).head


def test_kimi_k2_is_as_large_as_its_release():
    config = model_of("k2")
    assert total(parameters(config)) == 1_026_408_209_408
    assert active(parameters(config), config) == pytest.approx(32.86e9, rel=1e-3)


@pytest.mark.parametrize("option", ["nano", "small-gqa", "small-dense"])
def test_operations_are_those_that_torch_counts(option):
    config = model_of(option, vocab_size=512)
    assert work(config, keys=64).training == pytest.approx(counted_operations(config, batch=2, length=64), rel=0.01)
