"""``k2train export``: a checkpoint as a folder that transformers, vLLM and lm-evaluation-harness load."""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path

import torch

from k2train.checkpoint import Checkpoint, find_checkpoint
from k2train.cli.trained import load_model, trained_model
from k2train.comm import close_world, open_world
from k2train.config import ExportConfig, RunConfig, parse
from k2train.data import Tokenizer
from k2train.export import (
    DTYPES,
    ExportError,
    Vocabulary,
    check_export,
    model_card,
    why_not,
    write_folder,
)
from k2train.paths import RunPaths
from k2train.train.phases import build_plan
from k2train.units import memory


def run(config: ExportConfig) -> int:
    """Writes it, proves it and says so; returns the exit status."""
    try:
        export(config)
    finally:
        close_world()
    return 0


def export(config: ExportConfig) -> Path:
    """The folder.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ExportError: it cannot be written in the released layout, or transformers does not give the same numbers.
    """
    world = open_world("cpu")
    path = Path(config.checkpoint).expanduser()
    checkpoint = find_checkpoint(path, world=world, say=lambda text: print(text, file=sys.stderr))
    trained, model = parse(RunConfig, checkpoint.manifest.state["config"]), trained_model(checkpoint)
    run_folder = checkpoint.folder.parent.parent
    folder = run_folder / "export" / f"{checkpoint.folder.name}-{config.dtype}"
    if config.folder is not None:
        folder = Path(config.folder).expanduser()
    masters = [t.shape for name, t in checkpoint.manifest.tensors.items() if name.endswith("/master")]
    size = write_folder(
        checkpoint,
        folder,
        config=model,
        vocabulary=_vocabulary(checkpoint, trained, config.tokenizer),
        card=model_card(
            trained,
            model,
            checkpoint.manifest.state,
            step=checkpoint.manifest.step,
            steps=build_plan(trained).steps,
            parameters=sum(map(math.prod, masters)),
            dtype=config.dtype,
        ),
        dtype=config.dtype,
        shard_bytes=config.shard_bytes,
    )
    print(f"wrote {folder}: {memory(size)} of weights in {config.dtype}")
    reason = why_not(model) if config.compare == "auto" else None
    if config.compare == "never" or reason:
        print(f"not loaded with transformers: {reason or 'compare=never'}")
    else:
        print(check_export(folder, load_model(checkpoint, torch.device("cpu"), rounded_to=DTYPES[config.dtype])))
    return folder


def _vocabulary(checkpoint: Checkpoint, trained: RunConfig, path: str | None) -> Vocabulary:
    """The tokenizer that the checkpoint was trained with."""
    file = Path(path).expanduser() if path is not None else RunPaths(checkpoint.folder.parent.parent).tokenizer
    if not file.is_file():
        raise ExportError(f"{file}: there is no tokenizer; give the run's, as in tokenizer=runs/first/tokenizer.json")
    definition = file.read_text(encoding="utf-8")
    digest = hashlib.sha256(definition.encode()).hexdigest()
    if (wanted := checkpoint.manifest.state.get("data", {}).get("tokenizer", digest)) != digest:
        raise ExportError(f"{file} is not the tokenizer of {checkpoint.folder}: its sha256 is {digest}, not {wanted}")
    end = trained.data.tokenizer.end_of_text
    return Vocabulary(definition, end, Tokenizer(definition, engine="tokenizers", end_of_text=end).end_of_text)
