"""The bijection with the released layout, at the size of every shipped config, against transformers' own."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import yaml
from hugging_face import hf_config, released_layout, transformers

from k2train.config import ModelConfig, parse
from k2train.export import Place, own_place, own_shapes, released_name, released_shapes
from k2train.model import build_model

CONFIGS = {path.stem: path for path in (Path(__file__).parents[2] / "configs" / "model").glob("*.yaml")}
Shapes = dict[str, tuple[int, ...]]


def meta(name: str) -> tuple[ModelConfig, Shapes]:
    """The config, and name and shape of all that our model saves, without storage."""
    config = parse(ModelConfig, yaml.safe_load(CONFIGS[name].read_text()))
    config = dataclasses.replace(config, vocab_size=config.vocab_size or 4096)
    model = build_model(config, seed=0, device="meta")
    return config, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_complete_and_disjoint(name: str) -> None:
    config, own = meta(name)
    released = released_shapes(own)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(hf_config(config))
    expected = released_layout(theirs, theirs.state_dict())
    assert released == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert sum(map(math.prod, released.values())) == sum(map(math.prod, own.values()))
    assert own_shapes(released) == own
    assert all(released_name(own_place(name)) == name for name in released)


@pytest.mark.parametrize(
    ("name", "parameters", "biases", "tensors"),
    [
        ("k2", 1_026_408_209_408, 60 * 384, 3 + 61 * 9 + 3 + 60 * (5 + 3 * 384)),
        ("moonlight-16b", 15_960_108_544, 26 * 64, 3 + 27 * 7 + 3 + 26 * (5 + 3 * 64)),
    ],
)
def test_the_released_models(name: str, parameters: int, biases: int, tensors: int) -> None:
    config, own = meta(name)
    released = released_shapes(own)
    bias = {name: shape for name, shape in released.items() if name.endswith(".e_score_correction_bias")}
    assert sum(map(math.prod, released.values())) == parameters + biases
    assert set(bias.values()) == {(config.n_routed_experts,)}
    assert sum(map(math.prod, bias.values())) == biases
    assert len(released) == tensors
    last = f"model.layers.{config.num_hidden_layers - 1}.mlp.experts.{config.n_routed_experts - 1}"
    assert released[f"{last}.down_proj.weight"] == (config.hidden_size, config.moe_intermediate_size)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("lm_head.weight", Place("lm_head.weight")),
        ("model.embed_tokens.weight", Place("embed_tokens.weight")),
        ("model.layers.60.mlp.gate.e_score_correction_bias", Place("layers.60.mlp.gate.e_score_correction_bias")),
        ("model.layers.7.mlp.experts.383.gate_proj.weight", Place("layers.7.mlp.experts.w1", 383)),
        ("model.layers.7.mlp.experts.0.up_proj.weight", Place("layers.7.mlp.experts.w3", 0)),
        ("model.layers.7.mlp.experts.12.down_proj.weight", Place("layers.7.mlp.experts.w2", 12)),
        ("model.layers.7.mlp.shared_experts.up_proj.weight", Place("layers.7.mlp.shared_experts.up_proj.weight")),
    ],
)
def test_single_names(name: str, place: Place) -> None:
    assert own_place(name) == place
    assert released_name(place) == name


@pytest.mark.parametrize(
    "name",
    [
        "layers.1.mlp.experts.0.up_proj.weight",  # ours has no such name, theirs a prefix
        "embed_tokens.weight",
        "model.lm_head.weight",
        "model.model.norm.weight",
        "model.layers.1.mlp.experts.w1",
        "model.layers.1.mlp.experts.gate_up_proj",  # transformers' own, in memory
        "model.layers.1.mlp.experts.01.up_proj.weight",
        "model.layers.1.mlp.experts.1.up_proj.weight_scale_inv",  # of 8-bit weights
        "model.layers.x.input_layernorm.weight",
        "model.layers.01.input_layernorm.weight",
        "model.layers.1.self_attn.o_proj.weight_scale_inv",
        "model.norm.bias",
    ],
)
def test_what_is_not_of_the_released_layout(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is no tensor of the released layout"):
        own_place(name)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        (Place("layers.1.mlp.experts.w1"), "is a stack of experts, given with expert=None"),
        (Place("layers.1.mlp.experts.w1", -1), "expert=-1"),
        (Place("norm.weight", 3), "norm.weight with expert=3 is no stack of experts"),
        (Place("model.norm.weight"), "is no tensor of a k2train model"),
        (Place("layers.1.mlp.experts.w4"), "is no tensor of a k2train model"),
    ],
)
def test_what_is_no_place_of_ours(place: Place, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        released_name(place)


def test_experts_that_make_no_stack() -> None:
    names = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in (0, 1, 2)]
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj\.weight is missing"):
        own_shapes({names[0]: (2, 3), names[2]: (2, 3)})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.w3 have different shapes, \[\(2, 3\), \(2, 4\)\]"):
        own_shapes({names[0]: (2, 3), names[1]: (2, 4)})
