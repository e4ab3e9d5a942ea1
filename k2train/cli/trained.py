"""What a checkpoint holds, as a model: for the commands that use one."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from k2train.checkpoint import Checkpoint, CheckpointError, choose_checkpoint, find_checkpoint
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.comm import World
from k2train.config import ModelConfig, RunConfig, parse, to_dict
from k2train.data import Tokenizer
from k2train.export import ReleasedFolder, is_released, released_tokenizer
from k2train.model import Transformer, build_model
from k2train.paths import RunPaths
from k2train.train.phases import build_plan


@dataclass(frozen=True)
class Trained:
    """A model that can be used, whole on this process.

    Attributes:
        folder: of the checkpoint, or of the model in Hugging Face's format.
        model: in eval mode.
        tokenizer: of the model.
        definition: its ``tokenizer.json``.
        checkpoint: None of a model in Hugging Face's format.
    """

    folder: Path
    model: Transformer
    tokenizer: Tokenizer
    definition: str
    checkpoint: Checkpoint | None

    @property
    def digest(self) -> str:
        """The sha256 of the tokenizer."""
        return hashlib.sha256(self.definition.encode()).hexdigest()


def load_trained(path: Path, *, precision: str, world: World) -> Trained:
    """The model of a run's newest checkpoint, of a checkpoint, or of a folder in Hugging Face's format.

    Args:
        path: of one of them.
        precision: of the weights: bf16, fp32, or auto, which is bf16 on a GPU and fp32 on a CPU.
        world: of this process alone.

    Raises:
        CheckpointError: the folder is no run, or one without a whole checkpoint.
        ExportError: it is a model that k2train does not have.
    """
    narrow = precision == "bf16" or (precision == "auto" and world.device.type == "cuda")
    dtype = torch.bfloat16 if narrow else torch.float32
    if is_released(path):
        released = ReleasedFolder(path, defaults=parse(RunConfig, compose(TRAIN, [])).model)
        definition, tokenizer, _ = released_tokenizer(path, released.settings)
        return Trained(path, released.load_model(world.device, dtype), tokenizer, definition, None)
    checkpoint = find_checkpoint(path, world=world, say=lambda text: print(text, file=sys.stderr))
    file = RunPaths(checkpoint.folder.parent.parent).tokenizer
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no tokenizer beside {checkpoint.folder}: put the run's there")
    definition = file.read_text(encoding="utf-8")
    end = checkpoint.manifest.state["config"]["data"]["tokenizer"]["end_of_text"]
    tokenizer = Tokenizer(definition, engine="tokenizers", end_of_text=end)
    model = load_model(checkpoint, world.device, dtype=dtype)
    return Trained(checkpoint.folder, model, tokenizer, definition, checkpoint)


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
