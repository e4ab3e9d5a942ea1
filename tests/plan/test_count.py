"""Counts from the config are those of the model."""

import pytest

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.cli.options import group_options
from k2train.config import ModelConfig, RunConfig, parse
from k2train.model import build_model
from k2train.plan.count import active, parameters, total, work
from tests.plan.operations import counted_operations


def model_of(option: str, **changes: object) -> ModelConfig:
    words = [f"model={option}", *(f"model.{key}={value}" for key, value in changes.items())]
    return parse(RunConfig, compose(TRAIN, words)).model


@pytest.mark.parametrize("option", group_options("model", []))
def test_parameters_are_those_of_the_model(option):
    config = model_of(option)
    config = config if config.vocab_size else model_of(option, vocab_size=4096)
    model = build_model(config, seed=0, device="meta")
    roles = model.parameter_roles()
    assert [(p.name, p.role, p.shape) for p in parameters(config)] == [
        (name, roles[name], tuple(p.shape)) for name, p in model.named_parameters()
    ]


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
