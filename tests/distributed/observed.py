"""The telemetry of a step, computed anew from the whole tensors of one process: what every layout's is held against."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from muonclip import MuonClip
from torch import Tensor

from k2train.model import Transformer


class Observer:
    """Looks at a step of a plain loop, from between the backward pass and the optimizer's step on."""

    def __init__(self, model: Transformer, optimizer: MuonClip) -> None:
        self._model, self._optimizer = model, optimizer
        self._before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
        grads = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
        self._found: dict[str, Any] = {"layer_grad_norm": {k: t.norm() for k, t in by_layer(grads).items()}}

    def after(self, loads: Mapping[str, Tensor]) -> dict[str, Any]:
        """After the optimizer's step: as in a record, with the loads that the routers have counted."""
        weights = {name: parameter.detach().double() for name, parameter in self._model.named_parameters()}
        found = self._found
        found["layer_weight_rms"] = {key: rms(tensor) for key, tensor in by_layer(weights).items()}
        found["layer_update_rms"] = {key: rms(tensor) for key, tensor in by_layer(dict(self._updates(weights))).items()}
        clip = self._optimizer.qk_clip
        layers = [layer(name) for name, _ in clip.layers]
        found["head_max_logit"] = dict(zip(layers, clip.max_logits.tolist(), strict=True))
        found["head_clip"] = dict(zip(layers, clip.gamma.tolist(), strict=True))
        found["head_scale"] = dict(zip(layers, clip.cumulative.tolist(), strict=True))
        found["head_max_logit_exact"] = {name: [1] * clip.gamma.shape[1] for name in layers}
        shares = {layer(name): (load / load.sum()).tolist() for name, load in loads.items()}
        found["expert_load"] = {name: [len(share) * s for s in share] for name, share in shares.items()}
        found["expert_max_violation"] = {name: len(share) * max(share) - 1 for name, share in shares.items()}
        found["expert_dead"] = {name: share.count(0) / len(share) for name, share in shares.items()}
        found["expert_entropy"] = {
            name: -sum(s * math.log(s) for s in share if s) / math.log(len(share)) for name, share in shares.items()
        }
        roles = self._model.parameter_roles()
        matrices = {n: w for n, w in weights.items() if roles[n] in ("attention", "mlp", "expert", "router")}
        found["weight_entropy"] = {n: entropy(w if w.ndim == 3 else w[None]) for n, w in matrices.items()}
        return found

    def _updates(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What was subtracted, over the learning rate, without decay and clip."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        for group in self._optimizer.param_groups:
            for name in (names[id(parameter)] for parameter in group["params"]):
                scales, after = self._optimizer.clip_scales(name), weights[name]
                if scales is not None:
                    after = after / scales.double()[:, None]
                yield name, (self._before[name] * (1 - group["lr"] * group["weight_decay"]) - after) / group["lr"]


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All elements of each layer."""
    parts: defaultdict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in tensors.items():
        parts[layer(name)].append(tensor.flatten())
    return {name: torch.cat(found) for name, found in parts.items()}


def layer(name: str) -> str:
    return ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])


def rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


def entropy(stack: Tensor) -> Tensor:
    """Mean over [n, rows, columns] of the entropy of the squared singular values, as a share of the largest."""
    squares = torch.linalg.svdvals(stack).square()
    share = squares / squares.sum(-1, keepdim=True)
    return -(share * share.log()).sum(-1).mean() / math.log(share.shape[-1])


def flat(value: Any, name: str = "") -> dict[str, float]:
    """The numbers of a nested value by their path."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {key: number for k, item in items for key, number in flat(item, f"{name}.{k}").items()}
    return {name: float(value)}


def apart(record: Mapping[str, Any], expected: Mapping[str, float]) -> float:
    """The largest difference of a number, over the number or over 0.01 if that is more; inf if one is not there."""
    found = flat({key: record[key] for key in record if key.startswith(("layer_", "head_", "expert_", "weight_"))})
    if found.keys() != expected.keys():
        return math.inf
    return max(abs(found[key] - number) / max(abs(number), 0.01) for key, number in expected.items())
