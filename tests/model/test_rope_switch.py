"""Positions may be extended while a model is trained: it then is what one built that way would be."""

import dataclasses

import pytest
import torch

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import RopeScalingConfig, RunConfig, parse
from k2train.model import build_model

YARN = RopeScalingConfig(
    factor=8.0, original_max_position_embeddings=16, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.5
)


@pytest.mark.parametrize("kind", ["small", "small-gqa"])
def test_after_the_switch_logits_are_those_of_a_model_built_so(kind):
    config = parse(RunConfig, compose(TRAIN, [f"model={kind}", "model.num_hidden_layers=2"])).model
    config = dataclasses.replace(config, vocab_size=64, first_k_dense_replace=1)
    tokens = torch.arange(48)[None] % 64
    switched, plain = (build_model(config, seed=3).eval() for _ in range(2))
    extended = build_model(dataclasses.replace(config, rope_scaling=YARN), seed=3).eval()
    switched.set_rope_scaling(YARN)
    with torch.no_grad():
        assert torch.equal(switched.logits(tokens), extended.logits(tokens))
        assert not torch.allclose(switched.logits(tokens), plain.logits(tokens))
        switched.set_rope_scaling(None)
        assert torch.equal(switched.logits(tokens), plain.logits(tokens))
