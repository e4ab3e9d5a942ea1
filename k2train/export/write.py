"""A checkpoint as a folder in the released layout, written a tensor at a time: memory holds the largest and no more."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from k2train.checkpoint import Checkpoint, Deferred, IntervalReader, write_safetensors
from k2train.config import ModelConfig
from k2train.export.architecture import ExportError, released_config
from k2train.export.names import own_place, released_shapes
from k2train.export.tokenizer import tokenizer_files
from k2train.model import build_model
from k2train.paths import atomic_write, sync_directory
from k2train.units import memory

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INDEX = "model.safetensors.index.json"
BIAS = ".e_score_correction_bias"
PIECE = 1 << 20  # elements read at once
SPARE = 1 << 22  # bytes of all small files


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as an export needs it."""

    definition: str  # tokenizer.json
    end_of_text: str
    end_of_text_id: int


def own_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of all that a model saves: parameters, with all experts in each stack, and router biases."""
    state = build_model(config, seed=0, device="meta").state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def write_folder(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    config: ModelConfig,
    vocabulary: Vocabulary,
    card: str,
    dtype: str,
    shard_bytes: int,
) -> int:
    """Writes the model aside and renames the folder when it is whole.

    Args:
        checkpoint: any, whatever layout wrote it.
        folder: that will hold it; it must not be there yet.
        config: the architecture as it was trained, with its vocabulary.
        vocabulary: the tokenizer.
        card: the text of README.md.
        dtype: of the weights, bf16 or fp32. Router biases are fp32.
        shard_bytes: of tensors in a file, at most, but for a tensor that is larger.

    Returns:
        Bytes of all weights.

    Raises:
        ExportError: no class of others can hold the model, the checkpoint is of another one, the folder is there, or
            the disk has no room.
        OSError: it cannot be written.
    """
    settings = released_config(
        config, dtype=str(DTYPES[dtype]).removeprefix("torch."), end_of_text=vocabulary.end_of_text_id
    )
    tensors = _tensors(checkpoint, config, DTYPES[dtype])
    total = sum(tensor.nbytes for tensor in tensors.values())
    if folder.exists():
        raise ExportError(f"{folder} is there already: give another folder=..., or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < total + SPARE:
        raise ExportError(
            f"the model takes {memory(total)} and the disk of {folder} has {memory(free)} free: make room"
        )
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        shards = list(_shards(tensors, shard_bytes))
        places: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(aside / file, {name: tensors[name] for name in names})
            places |= dict.fromkeys(names, file)
        generation = {key: settings[key] for key in ("bos_token_id", "eos_token_id")}
        texts = {
            "config.json": _json(settings),
            "generation_config.json": _json(generation),
            INDEX: _json({"metadata": {"total_size": total}, "weight_map": places}),
            "README.md": card,
        }
        texts |= tokenizer_files(
            vocabulary.definition, end_of_text=vocabulary.end_of_text, context=config.max_position_embeddings
        )
        for name, text in texts.items():
            atomic_write(aside / name, text)
        os.replace(aside, folder)
        sync_directory(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room
        raise
    return total


def _tensors(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> dict[str, Deferred]:
    """Every tensor of the released layout, read from the checkpoint when it is written."""
    own = own_tensors(config)
    there = {
        key.rpartition("/")[0]: (tensor.shape, key.rpartition("/")[2])
        for key, tensor in checkpoint.manifest.tensors.items()
        if key.endswith(("/master", "/buffer"))
    }
    for name in sorted(own.keys() | there.keys()):
        found = there[name][0] if name in there else None
        if found != own.get(name):
            raise ExportError(
                f"{checkpoint.folder} does not fit its own settings: {name} has the shape {found}, not {own.get(name)}"
            )
    reader, tensors = checkpoint.reader, {}
    for name, shape in released_shapes(own).items():
        kind = torch.float32 if name.endswith(BIAS) else dtype
        tensors[name] = Deferred(shape, kind, _Read(reader, name, there[own_place(name).name][1], shape, kind))
    if config.has_experts and not config.n_shared_experts:
        tensors |= _no_shared_experts(config, dtype)
    return tensors


@dataclass(frozen=True)
class _Read:
    """Reads a released tensor out of a checkpoint, by pieces: none of it is in memory twice."""

    reader: IntervalReader
    name: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self) -> torch.Tensor:
        place, numel = own_place(self.name), math.prod(self.shape)
        start = (place.expert or 0) * numel
        out = torch.empty(numel, dtype=self.dtype)
        for begin in range(0, numel, PIECE):
            self.reader.fill(place.name, self.key, start + begin, out[begin : begin + PIECE])
        return out.view(self.shape)


def _no_shared_experts(config: ModelConfig, dtype: torch.dtype) -> dict[str, Deferred]:
    """What transformers' class has in the place of shared experts that there are none of: matrices without rows."""
    D = config.hidden_size
    shapes = {"gate_proj": (0, D), "up_proj": (0, D), "down_proj": (D, 0)}
    return {
        f"model.layers.{layer}.mlp.shared_experts.{name}.weight": Deferred(
            shape, dtype, partial(torch.empty, shape, dtype=dtype)
        )
        for layer in range(config.first_k_dense_replace, config.num_hidden_layers)
        for name, shape in shapes.items()
    }


def _shards(tensors: Mapping[str, Deferred], limit: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, in order."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
