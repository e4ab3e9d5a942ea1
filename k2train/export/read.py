"""A folder in the released layout, whoever wrote it: every tensor accounted for, read one at a time in fp32."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from k2train.checkpoint import SafetensorsFile
from k2train.config import ModelConfig
from k2train.export.architecture import ExportError, own_config
from k2train.export.names import Place, released_name, released_shapes
from k2train.export.write import INDEX, own_tensors
from k2train.model import Transformer, build_model

SCALE = "_scale_inv"  # behind the name of an 8-bit weight
WIDE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EIGHT_BIT = "F8_E4M3"
# A position table that some releases carry along; it follows from config.json.
_TABLE = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_SHOWN = 8  # faults of a kind in a message


class ReleasedFolder:
    """A model in the released layout: DeepSeek-V3's and Kimi K2's, or that of our other exports.

    Weights are bf16, fp16, fp32 or fp8 with a scale for each block of 128x128 (DeepSeek-V3, arXiv 2412.19437, section
    3.3): fp8 is multiplied out when it is read.

    Attributes:
        path: of the folder.
        settings: its config.json.
        config: the architecture.
        left_out: sentences on tensors that are no part of our model.
    """

    def __init__(self, path: Path, *, defaults: ModelConfig) -> None:
        """Reads config.json and the heads of the files, and holds each tensor's name and shape against them.

        Args:
            path: of the folder.
            defaults: for what no release states, see ``own_config``.

        Raises:
            ExportError: it is no such folder, of another architecture, quantised in another way, or tensors are
                missing, left over or misshapen; all are named.
        """
        self.path = path
        self.settings = _read_json(path / "config.json")
        self.left_out: list[str] = []
        self._block = _block_size(self.settings)
        self.config = own_config(self.settings, defaults=defaults)
        self._files = {name: SafetensorsFile(path / name) for name in _file_names(path)}
        self._homes = {tensor: file for file in self._files.values() for tensor in file.header}
        self._check()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of our model."""
        return own_tensors(self.config)

    @property
    def dtypes(self) -> set[str]:
        """In which the weights are, as safetensors names them."""
        return {self._entry(name)["dtype"] for name in released_shapes(self.shapes)}

    def read(self, place: Place) -> torch.Tensor:
        """One tensor of our model, or one expert of a stack, in fp32."""
        name = released_name(place)
        entry = self._entry(name)
        shape = tuple(entry["shape"])
        if entry["dtype"] != EIGHT_BIT:
            return self._load(name, WIDE[entry["dtype"]]).to(torch.float32).view(shape)
        weight = self._load(name, torch.float8_e4m3fn).to(torch.float32).view(shape)
        scale_name = name + SCALE
        scale = self._load(scale_name, WIDE[self._entry(scale_name)["dtype"]]).to(torch.float32)
        return dequantise(weight, scale.view(self._entry(scale_name)["shape"]), block=self._block)

    def load_model(self, device: torch.device, dtype: torch.dtype) -> Transformer:
        """The whole model."""
        model = build_model(self.config, seed=0, device="meta", dtype=dtype).to_empty(device=device)
        tensors = model.state_dict()
        with torch.no_grad():
            for name, shape in self.shapes.items():
                if len(shape) == 3:
                    for expert, out in enumerate(tensors[name]):
                        out.copy_(self.read(Place(name, expert)))
                else:
                    tensors[name].copy_(self.read(Place(name)))
        return model.eval()

    def _entry(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = self._homes[name].header[name]
        return entry

    def _load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        numel = math.prod(self._entry(name)["shape"])
        return torch.from_numpy(self._homes[name].bytes(name, 0, numel).copy()).view(dtype)

    def _check(self) -> None:
        wanted = released_shapes(self.shapes)
        there = {name: tuple(self._entry(name)["shape"]) for name in self._homes}
        rest = there.keys() - wanted.keys() - self._scales(wanted, there)
        extra_layers = {
            name
            for name in rest
            if (match := re.match(r"model\.layers\.(\d+)\.", name))
            and 0
            <= int(match[1]) - self.config.num_hidden_layers
            < (self.settings.get("num_nextn_predict_layers") or 0)
        }
        tables = {name for name in rest if _TABLE.fullmatch(name)}
        empty = {name for name in rest if not math.prod(there[name])}
        for names, what in ((extra_layers, "of layers that predict further tokens"), (tables, "of positions")):
            if names:
                self.left_out.append(f"left out {len(names)} tensors {what}, which are no part of this model")
        kinds = {
            name: self._entry(name)["dtype"]
            for name in wanted.keys() & there.keys()
            if self._entry(name)["dtype"] not in (*WIDE, EIGHT_BIT)
        }
        faults = [
            ("missing", sorted(wanted.keys() - there.keys())),
            ("left over", sorted(rest - extra_layers - tables - empty)),
            ("misshapen", [f"{n} {list(there[n])} for {list(wanted[n])}" for n in _differing(wanted, there)]),
            ("of another type", [f"{name} {kind}" for name, kind in sorted(kinds.items())]),
        ]
        if any(names for _, names in faults):
            told = "; ".join(f"{len(names)} tensors {what}: {_some(names)}" for what, names in faults if names)
            raise ExportError(f"{self.path} does not hold the model that its config.json describes: {told}")

    def _scales(self, wanted: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]]) -> set[str]:
        """The scales that belong to 8-bit weights.

        Raises:
            ExportError: an 8-bit weight has none, or one of the wrong shape.
        """
        found = set()
        for name in wanted.keys() & there.keys():
            if self._entry(name)["dtype"] != EIGHT_BIT:
                continue
            blocks = tuple(-(-size // block) for size, block in zip(there[name], self._block, strict=True))
            if there.get(name + SCALE) != blocks:
                raise ExportError(
                    f"{self.path}: {name} is fp8 and needs {name + SCALE} of shape {list(blocks)}, "
                    f"but there is {list(there[name + SCALE]) if name + SCALE in there else 'none'}"
                )
            found.add(name + SCALE)
        return found


def dequantise(weight: torch.Tensor, scale: torch.Tensor, *, block: tuple[int, int]) -> torch.Tensor:
    """``weight[i, j] * scale[i // rows, j // columns]``.

    Args:
        weight: [m, n] fp32, of 8-bit values.
        scale: a number for each block, [ceil(m / rows), ceil(n / columns)] fp32.
        block: its rows and columns.
    """
    (rows, columns), (m, n) = block, weight.shape
    padded = F.pad(weight, (0, -n % columns, 0, -m % rows))
    blocks = padded.view(scale.shape[0], rows, scale.shape[1], columns)
    return (blocks * scale[:, None, :, None]).view(padded.shape)[:m, :n].contiguous()


def is_released(path: Path) -> bool:
    """Whether a folder looks like a model in the released layout, rather than a run."""
    return (path / "config.json").is_file() and (any(path.glob("*.safetensors")) or (path / INDEX).is_file())


def _file_names(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        names = sorted(set(_read_json(path / INDEX).get("weight_map", {}).values()))
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        raise ExportError(f"{path} holds no *.safetensors: give the folder of a model in Hugging Face's format")
    if lacking := [name for name in names if Path(name).name != name or not (path / name).is_file()]:
        raise ExportError(f"{path} lacks {_some(lacking)}, which its index names: it was not copied whole")
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{path}: it is not there; give the folder of a model in Hugging Face's format") from error
    except ValueError as error:
        raise ExportError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ExportError(f"{path} is no JSON object")
    return found


def _block_size(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Of the blocks of 8-bit weights.

    Raises:
        ExportError: the weights are quantised in another way, which is named.
    """
    quantised = settings.get("quantization_config") or settings.get("compression_config") or {}
    method = quantised.get("quant_method", "fp8")
    if method != "fp8" or quantised.get("fmt", "e4m3") != "e4m3":
        groups = quantised.get("config_groups", {}).values()
        kinds = {f"{g['weights'].get('type', '')}{g['weights'].get('num_bits', '')}".upper() for g in groups}
        raise ExportError(
            f"the weights are quantised by {method} {' '.join(sorted(kinds))}".rstrip()
            + ", which cannot be trained from: take a release in bf16, fp32 or block-scaled fp8 e4m3"
        )
    rows, columns = quantised.get("weight_block_size") or (128, 128)
    return int(rows), int(columns)


def _differing(wanted: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]]) -> list[str]:
    return sorted(name for name in wanted.keys() & there.keys() if wanted[name] != there[name])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
