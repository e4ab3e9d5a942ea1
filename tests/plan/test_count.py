"""Counts from the config are those of the model."""

import math
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.cli.options import group_options
from k2train.config import ModelConfig, RunConfig, parse
from k2train.model import build_model, causal
from k2train.plan.count import active, parameters, total, work

aten = torch.ops.aten
Shape = tuple[int, ...]


def added_product(_: Shape, left: Shape, right: Shape, **__: object) -> int:
    return 2 * math.prod(left) * right[-1]


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
    config, (batch, length) = model_of(option, vocab_size=512), (2, 64)
    model = build_model(config, seed=0).eval()  # whose largest logits nobody asks for
    tokens = torch.randint(512, (batch, length))
    # Of plain attention, whose products it sees; they do not leave out what is hidden. It does not know of products
    # that add to what is there already.
    with (
        mock.patch.object(causal, "choose_backend", return_value="math"),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping={aten.addmm_: added_product}) as counter,
    ):
        loss, balance = model(tokens, tokens.roll(-1, 1))
        (loss.mean() + balance).backward()
    counted = counter.get_total_flops() / (batch * length)
    assert work(config, keys=length).training == pytest.approx(counted, rel=0.01)
