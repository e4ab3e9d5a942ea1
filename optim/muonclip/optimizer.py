"""MuonClip (Kimi K2, arXiv 2507.20534, algorithm 1) as one torch optimizer for all parameters of a model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muonclip.newton_schulz import newton_schulz
from muonclip.qk_clip import QKClip, scale_rows_
from muonclip.sharded import Exchange, FlatLayout
from muonclip.update import adamw_, momentum_directions, muon_scale

ALGORITHMS = ("muon", "adamw")


class MuonClip(torch.optim.Optimizer):
    """Muon on matrices, AdamW on the rest, QK-Clip after both; in a plain loop or on the shards of ZeRO.

    State of each tensor, created at once: ``momentum`` (muon), or ``exp_avg``, ``exp_avg_sq`` and ``step`` (adamw); all
    in fp32, whatever the parameters are in.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        newton_schulz_steps: int = 5,
        newton_schulz_dtype: torch.dtype = torch.float32,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        qk_clip: QKClip | None = None,
    ) -> None:
        """Takes parameter groups; each may override lr, weight_decay and the other numbers.

        Args:
            groups: dicts with ``params``, a list of (name, parameter), and ``algorithm``, "muon" for matrices [m, n]
                and stacks of them [E, m, n] (an expert each), or "adamw". See ``split_parameters``.
            lr: learning rate of groups without their own.
            weight_decay: decoupled, times lr.
            momentum: mu of Muon.
            nesterov: Moonlight's form; False is K2's algorithm as printed.
            newton_schulz_steps: iterations.
            newton_schulz_dtype: in which they are computed.
            betas: of AdamW.
            eps: of AdamW.
            qk_clip: what bounds attention logits; None: nothing does.

        Raises:
            ValueError: a parameter or number that the algorithm cannot take, named.
        """
        own_groups = [dict(group) for group in groups]
        _check_groups(own_groups)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "newton_schulz_steps": newton_schulz_steps,
            "newton_schulz_dtype": newton_schulz_dtype,
            "betas": tuple(betas),
            "eps": eps,
        }
        self.qk_clip = qk_clip
        self._parameters = {name: p for group in own_groups for name, p in group["params"]}
        self._layouts: dict[int, FlatLayout] = {}
        self._exchanges: dict[int, Exchange] = {}
        super().__init__(own_groups, defaults)
        for group in self.param_groups:
            _check_numbers(group)
            for parameter in group["params"]:
                self._create_state(parameter, group)

    def shard(self, layouts: Mapping[Tensor, FlatLayout]) -> None:
        """Goes over to flat shards: each group's ``params`` is now one 1-D tensor that holds intervals of parameters.

        State is created anew, on the shards. ``step`` may then be called for all groups or for one at a time (ZeRO
        calls it with ``param_groups`` cut to one), by all ranks in the same order.

        Args:
            layouts: of the flat tensor of each group.

        Raises:
            ValueError: a group has no layout, or more than one tensor.
        """
        self.state.clear()
        for group in self.param_groups:
            if len(group["params"]) != 1 or (flat := group["params"][0]) not in layouts:
                raise ValueError("every group must hold one flat tensor that has a layout")
            layout = layouts[flat]
            for piece in layout.pieces_by_rank[layout.rank]:
                if piece.name not in self._parameters:
                    raise ValueError(f"the layout names {piece.name!r}, which is no parameter of this optimizer")
            self._layouts[id(flat)] = layout
            if group["algorithm"] == "muon":
                self._exchanges[id(flat)] = Exchange(layout)
            self._create_state(flat, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, then QK-Clip.

        The clip uses the largest logits since its last ``reset``. Unless the caller has gathered them already (and
        will reset them), they are gathered and reset here. Gradients must be finite: that is the caller's to see to.
        """
        if closure is not None:
            raise ValueError("a closure cannot be evaluated again: call backward() first, then step()")
        clip = self.qk_clip
        gather_here = clip is not None and not clip.gathered
        if clip is not None and gather_here:
            clip.gather()
        for group in self.param_groups:
            if group["params"] and id(group["params"][0]) in self._layouts:
                self._step_shard(group)
            else:
                self._step_whole(group)
        if clip is not None and gather_here:
            clip.reset()

    def _step_whole(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [_gradient(p) for p in params]
        states = [self.state[p] for p in params]
        if group["algorithm"] == "muon":
            directions = momentum_directions(
                grads, [s["momentum"] for s in states], momentum=group["momentum"], nesterov=group["nesterov"]
            )
            updates = orthogonal_updates(directions, group)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(
                params, [u.to(p.dtype) for u, p in zip(updates, params, strict=True)], alpha=-group["lr"]
            )
        else:
            _adamw(params, grads, states, group)
        for parameter in params:
            if (scales := self._scales_of(parameter)) is not None:
                parameter.mul_(scales.to(parameter.dtype)[:, None])

    def _step_shard(self, group: dict[str, Any]) -> None:
        (flat,) = group["params"]
        assert flat.grad is not None, "a shard always has a gradient: all ranks must take part in the exchange"
        state, layout = self.state[flat], self._layouts[id(flat)]
        if group["algorithm"] == "muon":
            (direction,) = momentum_directions(
                [flat.grad], [state["momentum"]], momentum=group["momentum"], nesterov=group["nesterov"]
            )
            update = self._exchanges[id(flat)].apply(direction, lambda matrices: orthogonal_updates(matrices, group))
            flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        else:
            _adamw([flat], [flat.grad], [state], group)
        for piece in layout.pieces_by_rank[layout.rank]:
            if (scales := self._scales_of(self._parameters[piece.name])) is not None:
                interval = flat[piece.offset : piece.offset + piece.stop - piece.start]
                scale_rows_(interval, scales, start=piece.start, columns=piece.shape[-1])

    def _scales_of(self, parameter: Tensor) -> Tensor | None:
        return None if self.qk_clip is None else self.qk_clip.scales_of(parameter)

    def _create_state(self, tensor: Tensor, group: Mapping[str, Any]) -> None:
        names = ("momentum",) if group["algorithm"] == "muon" else ("exp_avg", "exp_avg_sq")
        state = {name: torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False) for name in names}
        if group["algorithm"] == "adamw":
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        self.state[tensor] = state


def orthogonal_updates(directions: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
    """Muon's update of each direction [m, n] or [E, m, n]: orthogonalised and scaled, not yet times the learning rate.

    Matrices of one shape go through Newton-Schulz as one batch.
    """
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, direction in enumerate(directions):
        by_shape[tuple(direction.shape[-2:])].append(number)
    updates: list[Tensor] = list(directions)
    for (rows, columns), numbers in by_shape.items():
        stacks = [directions[n].reshape(-1, rows, columns) for n in numbers]
        orthogonal = newton_schulz(
            stacks[0] if len(stacks) == 1 else torch.cat(stacks),
            steps=group["newton_schulz_steps"],
            dtype=group["newton_schulz_dtype"],
        )
        orthogonal = orthogonal.mul(muon_scale(rows, columns))
        for n, part in zip(numbers, torch.split(orthogonal, [len(s) for s in stacks]), strict=True):
            updates[n] = part.reshape(directions[n].shape).to(directions[n].dtype)
    return updates


def _adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[dict[str, Tensor]], group: Mapping[str, Any]
) -> None:
    adamw_(
        params,
        grads,
        states,
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
    )


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    if parameter.grad.is_sparse:
        raise ValueError("a gradient is sparse: build the embedding with sparse=False")
    return parameter.grad


def _check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    seen: dict[int, str] = {}
    for group in groups:
        if group.get("algorithm") not in ALGORITHMS:
            raise ValueError(f"algorithm={group.get('algorithm')!r} of a group must be one of {', '.join(ALGORITHMS)}")
        for entry in group["params"]:
            if not isinstance(entry, tuple):
                raise ValueError("params must be (name, parameter) pairs, as model.named_parameters() gives them")
            name, parameter = entry
            if not parameter.is_floating_point():
                raise ValueError(f"{name} is {parameter.dtype}: only floating-point parameters can be trained")
            if id(parameter) in seen:
                raise ValueError(f"{seen[id(parameter)]} and {name} are one tensor (tied): give it once")
            seen[id(parameter)] = name
            if group["algorithm"] == "muon" and parameter.ndim not in (2, 3):
                raise ValueError(
                    f"{name} has shape {list(parameter.shape)}: Muon takes matrices [m, n] and stacks of them "
                    "[E, m, n]; give it to a group with algorithm='adamw'"
                )


def _check_numbers(group: Mapping[str, Any]) -> None:
    for key, low, high in (
        ("lr", 0, math.inf),
        ("weight_decay", 0, math.inf),
        ("momentum", 0, 1),
        ("eps", 0, math.inf),
    ):
        if not low <= group[key] < high:
            raise ValueError(f"{key}={group[key]} must be at least {low} and below {high}")
    if group["newton_schulz_steps"] < 1:
        raise ValueError(f"newton_schulz_steps={group['newton_schulz_steps']} must be at least 1")
