"""The folder of a run with a checkpoint, without training: for those that read one."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch

from k2train.checkpoint import Interval, choose_checkpoint, save_checkpoint
from k2train.cli import main
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.comm import World
from k2train.config import ModelConfig, RunConfig, parse, to_dict
from k2train.data.tokenizer import train_bpe
from k2train.model import Transformer, build_model

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
TEXTS = ["def read(path):\n    return path\n", "The cat sat on the mat; it's 12345 o'clock.\n\n  über 你好\n"]


def write_run(folder: Path, model: ModelConfig, *, seed: int = 0, cuts: int = 3, step: int = 20) -> Transformer:
    """Writes it, and returns the model: norms and router biases are away from their neutral start.

    Args:
        folder: of the run.
        model: its architecture; its vocabulary holds the tokenizer's 300 tokens.
        seed: of the weights.
        cuts: into how many intervals each tensor is cut, as by so many ranks.
        step: of the checkpoint.
    """
    definition = train_bpe(TEXTS * 3, vocab_size=300)
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(definition)
    built = random_model(model, seed=seed)
    config = parse(RunConfig, compose(TRAIN, ["experiment=tiny"]))
    config = dataclasses.replace(config, name=folder.name, model=dataclasses.replace(model, vocab_size=None))
    state: dict[str, Any] = {
        "config": to_dict(config),
        "vocab_size": model.vocab_size,
        "progress": {"step": step, "skipped_steps": 0, "elapsed": 5.0},
        "data": {
            "dataset": "d1",
            "tokenizer": hashlib.sha256(definition.encode()).hexdigest(),
            "tokens": {"text": 12000},
        },
        "machine": {"processes": 1, "zero_stage": 1, "expert_parallel": 1},
    }
    parameters = dict(built.named_parameters())
    tensors = {(name, "master"): p.detach() for name, p in parameters.items()}
    tensors |= {(name, "momentum"): torch.zeros_like(p) for name, p in parameters.items()}
    tensors |= {(name, "buffer"): b for name, b in built.state_dict().items() if name not in parameters}
    intervals = []
    for (name, key), tensor in tensors.items():
        start = 0
        for part in tensor.flatten().tensor_split(cuts):
            if len(part):
                intervals.append(Interval(name, key, start, part))
            start += len(part)
    shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    save_checkpoint(folder / "checkpoints", step=step, intervals=intervals, shapes=shapes, state=state, world=ALONE)
    return built


def random_model(config: ModelConfig, *, seed: int) -> Transformer:
    """A model whose norms and router biases are away from their neutral start."""
    model = build_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for _, moe in model.moe_layers():
            bias = moe.gate.e_score_correction_bias
            bias += 0.05 * torch.randn(bias.shape, generator=generator)
    return model.eval()


def export(run: Path, folder: Path, **keys: Any) -> Path:
    """Exports a run's newest checkpoint through the command line, in fp32 and without transformers unless told so."""
    words = {"folder": folder, "dtype": "fp32", "compare": "never"} | keys
    assert main(["export", str(run), *(f"{key}={value}" for key, value in words.items())]) == 0
    return folder


def same_tensors(run: Path, model: Transformer) -> None:
    """The run's newest checkpoint holds the model, bit for bit."""
    checkpoint = choose_checkpoint(run)
    checkpoint.check_segments()
    assert not list(checkpoint.faults())
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        read = checkpoint.reader.read(name, "master" if name in parameters else "buffer")
        assert torch.equal(read, tensor), name
    assert len(checkpoint.manifest.tensors) == len(model.state_dict())
