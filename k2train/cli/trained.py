"""What a checkpoint holds, as a model: for the commands that use one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from k2train.checkpoint import Checkpoint, CheckpointError, choose_checkpoint
from k2train.config import ModelConfig, RunConfig, parse, to_dict
from k2train.model import Transformer, build_model
from k2train.train.phases import build_plan


def trained_model(checkpoint: Checkpoint) -> ModelConfig:
    """The architecture as it was in the last step: with its vocabulary, and positions extended as in that phase."""
    config = parse(RunConfig, checkpoint.manifest.state["config"])
    plan = build_plan(config)
    last = plan.step(min(max(checkpoint.manifest.step - 1, 0), plan.steps - 1))
    vocab_size = checkpoint.manifest.state["vocab_size"]
    return dataclasses.replace(config.model, vocab_size=vocab_size, rope_scaling=last.phase.rope_scaling)


def inherited(path: Path) -> dict[str, Any]:
    """The settings that a run has from the checkpoint it begins with: model and tokenizer, by key.

    Nothing where there is no checkpoint: the run will say so.
    """
    try:
        checkpoint = choose_checkpoint(path)
    except CheckpointError:
        return {}
    return {
        "model": to_dict(trained_model(checkpoint)),
        "data.tokenizer": checkpoint.manifest.state["config"]["data"]["tokenizer"],
    }


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    rounded_to: torch.dtype = torch.float32,
) -> Transformer:
    """The model of a checkpoint, whole on this process.

    Args:
        checkpoint: of a run.
        device: where it will live.
        dtype: of its weights.
        rounded_to: what they are rounded to before.
    """
    model = build_model(trained_model(checkpoint), seed=0, device="meta", dtype=dtype).to_empty(device=device)
    reader = checkpoint.reader
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name, "master").to(rounded_to))
        for name, moe in model.moe_layers():
            moe.gate.e_score_correction_bias.copy_(reader.read(f"{name}.gate.e_score_correction_bias", "buffer"))
    return model.eval()
