"""``k2train generate`` speaks with the weights of the checkpoint."""

import dataclasses

import pytest
import torch

from k2train.checkpoint import Interval, newest_checkpoint, save_checkpoint
from k2train.cli import main
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.cli.trained import load_model
from k2train.comm import close_world, open_world
from k2train.config import RunConfig, parse, to_dict
from k2train.data.tokenizer import train_bpe
from k2train.model import build_model
from k2train.paths import RunPaths

PROMPT = "def read("


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with a checkpoint, and the model in it."""
    paths = RunPaths(tmp_path_factory.mktemp("run"))
    config = parse(RunConfig, compose(TRAIN, ["experiment=tiny"]))
    paths.tokenizer.write_text(train_bpe(["def read(path):\n    return path\n"] * 3, vocab_size=300))
    model = build_model(dataclasses.replace(config.model, vocab_size=320), seed=7)
    for _, moe in model.moe_layers():
        moe.gate.e_score_correction_bias.normal_()
    held = [Interval(name, "master", 0, p.detach().flatten()) for name, p in model.named_parameters()]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for layer, moe in model.moe_layers():
        name = f"{layer}.gate.e_score_correction_bias"
        held.append(Interval(name, "buffer", 0, moe.gate.e_score_correction_bias))
        shapes[name] = tuple(moe.gate.e_score_correction_bias.shape)
    world = open_world("cpu")
    save_checkpoint(
        paths.checkpoints,
        step=3,
        intervals=held,
        shapes=shapes,
        state={"config": to_dict(config), "vocab_size": 320},
        world=world,
    )
    close_world()
    return paths, model


def test_every_number_is_read(trained):
    paths, model = trained
    world = open_world("cpu")
    read = load_model(newest_checkpoint(paths.checkpoints, world=world, say=print), world.device)
    close_world()
    for (name, wanted), (_, found) in zip(model.named_parameters(), read.named_parameters(), strict=True):
        assert torch.equal(wanted, found), name
    for (name, wanted), (_, found) in zip(model.moe_layers(), read.moe_layers(), strict=True):
        assert torch.equal(wanted.gate.e_score_correction_bias, found.gate.e_score_correction_bias), name


def test_text_begins_with_the_prompt_and_follows_from_the_seed(trained, capsys):
    def text(seed):
        words = [
            f"run={trained[0].root}",
            f"generate.prompt={PROMPT}",
            "generate.max_tokens=8",
            f"generate.seed={seed}",
        ]
        assert main(["generate", "device=cpu", *words]) == 0
        return capsys.readouterr().out

    first = text(1)
    assert first.startswith(PROMPT)
    assert len(first) > len(PROMPT) + 1
    assert text(1) == first
    assert text(2) != first


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert main(["generate", f"run={tmp_path}", "device=cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"k2train: error: {tmp_path} holds no checkpoint")
