"""The shipped model configs: all keys there, and as large as they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from k2train.config import ModelConfig, parse
from k2train.model import build_model

FOLDER = Path(__file__).parents[2] / "configs" / "model"


def load(name: str) -> ModelConfig:
    return parse(ModelConfig, yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


def test_k2_has_exactly_its_parameters() -> None:
    model = build_model(load("k2"), seed=0, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_026_408_209_408
    biases = [moe.gate.e_score_correction_bias for _, moe in model.moe_layers()]
    assert sum(bias.numel() for bias in biases) == 23_040
    assert set(model.parameter_roles()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "vocabulary", "millions"),
    [
        ("moonlight-16b", 163840, 15_960),
        ("mini", 320, 0.349),
        ("nano", 4096, 1.26),
        ("small", 4096, 5.07),
        ("base", 8192, 46.4),
        ("small-gqa", 4096, 5.14),
        ("small-dense", 4096, 2.81),
        ("100m", 16384, 115.3),
        ("1b", 32768, 1_005),
    ],
)
def test_sizes(name: str, vocabulary: int, millions: float) -> None:
    config = load(name)
    assert config.vocab_size in (None, vocabulary)
    model = build_model(dataclasses.replace(config, vocab_size=vocabulary), seed=0, device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_every_shipped_config_is_listed_here() -> None:
    listed = {"k2", "moonlight-16b", "mini", "nano", "small", "base", "small-gqa", "small-dense", "100m", "1b"}
    assert {path.stem for path in FOLDER.glob("*.yaml")} == listed
