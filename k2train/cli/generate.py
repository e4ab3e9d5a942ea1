"""``k2train generate``: text from a run's newest checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from k2train.checkpoint import Checkpoint, find_checkpoint
from k2train.comm import close_world, open_world
from k2train.config import RunConfig, WriteConfig, parse
from k2train.data import Tokenizer
from k2train.generate import printable, sample_text
from k2train.model import Transformer, build_model
from k2train.paths import RunPaths
from k2train.train.phases import build_plan


def run(config: WriteConfig) -> int:
    """Prints the text; returns the exit status."""
    try:
        print(printable(write(config)))
    except ValueError as error:  # CheckpointError among them
        print(f"k2train: error: {error}", file=sys.stderr)
        return 1
    finally:
        close_world()
    return 0


def write(config: WriteConfig) -> str:
    """The text.

    Raises:
        CheckpointError: the folder is no run, or one without a whole checkpoint.
        ValueError: the device that is asked for is not there.
    """
    world = open_world(config.device)
    paths = RunPaths(Path(config.run))
    checkpoint = find_checkpoint(paths.root, world=world, say=lambda text: print(text, file=sys.stderr))
    tokenizer = Tokenizer(
        paths.tokenizer.read_text(encoding="utf-8"),
        engine="tokenizers",
        end_of_text=checkpoint.manifest.state["config"]["data"]["tokenizer"]["end_of_text"],
    )
    return sample_text(load_model(checkpoint, world.device), tokenizer, config.generate, world.device)


def load_model(checkpoint: Checkpoint, device: torch.device) -> Transformer:
    """The model of a checkpoint, whole on this process, in fp32."""
    saved, reader = checkpoint.manifest.state, checkpoint.reader
    config = parse(RunConfig, saved["config"])
    model = build_model(dataclasses.replace(config.model, vocab_size=saved["vocab_size"]), seed=0, device=device)
    model.set_rope_scaling(build_plan(config).step(checkpoint.manifest.step - 1).phase.rope_scaling)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name, "master"))
        for name, moe in model.moe_layers():
            moe.gate.e_score_correction_bias.copy_(reader.read(f"{name}.gate.e_score_correction_bias", "buffer"))
    return model
