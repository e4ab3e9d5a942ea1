"""Optimizers of a person's own: any ``torch.optim.Optimizer`` that treats each element by itself, as AdamW and Lion do.

Under ZeRO an optimizer never sees a parameter: it is given 1-D fp32 shards that hold parts of many, cut without regard
to rows. A rule that looks at a whole matrix or a norm would give other numbers on another number of processes, so such
a rule is refused, by trying it. What an optimizer remembers must lie in ``self.state[tensor]``: one number an element,
which checkpoints keep by global name as they keep momenta, or single numbers, as a count of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from muonclip import MuonClip
from muonclip.ownership import newton_schulz_cost
from muonclip.sharded import Exchange, FlatLayout, Work, plan_exchanges
from torch import Tensor, nn

from k2train.config import ConfigError, OptimConfig, OwnPart, explain, own_part

TRIED_ELEMENTS, TRIED_STEPS, HALFWAY = 64, 4, 2
TOLERANCE = 1e-5  # between a tensor that is updated in one piece or in two: kernels may round the rest of one otherwise
EXCHANGE_BYTES = 2**29  # that ranks hold to bring matrices together, of which the telemetry alone asks


class OwnOptimizer(torch.optim.Optimizer):
    """Stands where ``MuonClip`` does, for DeepSpeed, checkpoints and telemetry, and has a person's own do the step."""

    def __init__(self, groups: Iterable[Mapping[str, Any]], part: OwnPart, *, lr: float, weight_decay: float) -> None:
        """Constructs nothing of the person's own yet: that is done on the shards.

        Args:
            groups: of ``muonclip.split_parameters``, with ``lr`` and ``weight_decay``.
            part: of ``find_optimizer``.
            lr: of groups without their own, as ``weight_decay``.
            weight_decay: see there.
        """
        self._part, self._given = part, {"lr": lr, "weight_decay": weight_decay}
        self._inner: torch.optim.Optimizer | None = None
        self._layouts: dict[Tensor, FlatLayout] = {}
        self._group_of: dict[Tensor, int] = {}
        self.orthogonalized = None  # nothing is
        # As MuonClip's, but that the update has the weight decay in it.
        self.watch: Callable[[Tensor, Tensor, Tensor], None] | None = None
        super().__init__([{**group, "params": [p for _, p in group["params"]]} for group in groups], self._given)

    def shard(self, layouts: Mapping[Tensor, FlatLayout], *, relief: Mapping[int, int] | None = None) -> None:
        """Constructs the person's optimizer on the flat shards in ``param_groups``; see ``MuonClip.shard``.

        Raises:
            ConfigError: its constructor raises.
        """
        self._layouts = dict(layouts)
        self._group_of = {flat: number for number, group in enumerate(self.param_groups) for flat in group["params"]}
        self._inner = self._part.make([dict(group) for group in self.param_groups], **self._given)
        assert self._inner is not None
        self.param_groups, self.state = self._inner.param_groups, self._inner.state

    def tensors(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """All shards, each with its group; also those that ``params`` lacks between steps (ZeRO-3)."""
        return [(flat, self.param_groups[number]) for flat, number in self._group_of.items()]

    def exchange(self, tensor: Tensor, group: Mapping[str, Any]) -> Exchange:
        """What brings together the matrices of one of ``tensors``, for those that look at whole ones."""
        cost = partial(newton_schulz_cost, steps=1)
        return plan_exchanges([Work(self._layouts[tensor], cost, torch.float32, EXCHANGE_BYTES)], {})[0]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Has the person's optimizer update the shards that are in ``param_groups`` now: all, or those of a group."""
        assert self._inner is not None, "shard comes first"
        self._inner.param_groups = self.param_groups  # ZeRO cuts them to the group under way
        stepped = [(flat, group["lr"]) for group in self.param_groups for flat in group["params"]]
        for flat, _ in stepped:
            if flat in self.state and not self.state[flat]:  # DeepSpeed has looked whether there is any
                del self.state[flat]
        before = [flat.detach().clone() for flat, _ in stepped] if self.watch is not None else []
        self._inner.step()
        for (flat, lr), old in zip(stepped, before, strict=False):
            if self.watch is not None and flat.grad is not None and lr:
                self.watch(flat, flat.grad, old.sub_(flat.detach()).div_(lr))

    # ---- what a checkpoint keeps, beside the tensors that are laid out as the shards are

    def scalars(self) -> dict[str, dict[str, Any]]:
        """Single numbers of the state by role, fit for JSON; a role has the same on all shards.

        Raises:
            ConfigError: the state holds what is neither such a number nor one an element.
        """
        found: dict[str, dict[str, Any]] = {}
        for flat, group in self.tensors():
            single = {key: v for key, v in self.state.get(flat, {}).items() if not laid_out(v, flat)}
            found.setdefault(group["role"], {key: self._plain(key, value, flat) for key, value in single.items()})
        return found

    def set_scalars(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """The inverse, after ``make_room``."""
        for flat, group in self.tensors():
            for key, value in saved[group["role"]].items():
                if isinstance(value, dict):
                    device = flat.device if value["with_shard"] else torch.device("cpu")
                    value = torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]), device=device)
                self.state[flat][key] = value

    def make_room(self, flat: Tensor, dtypes: Mapping[str, torch.dtype]) -> None:
        """Makes the state of a shard zeros for what a checkpoint has of it; if that is nothing, as before a step."""
        self.state.pop(flat, None)
        if dtypes:
            self.state[flat] = {key: torch.zeros_like(flat, dtype=dtype) for key, dtype in dtypes.items()}

    def _plain(self, key: str, value: Any, flat: Tensor) -> Any:
        if isinstance(value, Tensor) and value.ndim == 0:
            with_shard = value.device == flat.device and flat.device.type != "cpu"
            return {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch."), "with_shard": with_shard}
        if value is None or isinstance(value, int | float | str):
            return value
        shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
        raise ConfigError(
            [
                f"{self._part.key}={self._part.name} keeps {key!r}, a {type(value).__name__}{shape}, for a tensor of "
                f"shape {list(flat.shape)}: its state must be one number an element or single numbers, as under ZeRO a "
                "rank holds parts of flattened parameters"
            ]
        )


AnyOptimizer = MuonClip | OwnOptimizer


def laid_out(value: Any, flat: Tensor) -> bool:
    """Whether a value of an optimizer's state has a number for each element of a shard."""
    return isinstance(value, Tensor) and value.shape == flat.shape


def find_optimizer(config: OptimConfig) -> OwnPart:
    """The optimizer that ``optim.name`` names, tried on the CPU: it does under ZeRO what it does elsewhere.

    Raises:
        ConfigError: there is none, its options are not its own, or it is not element-wise.
    """
    given = ("lr", "weight_decay")
    part = own_part("optim.name", config.name, config.options, base=torch.optim.Optimizer, args=1, given=given)
    try:
        _try(part)
    except ConfigError:
        raise
    except Exception as error:  # of the person's code: any that there is
        raise ConfigError([f"optim.name={part.name} cannot step a 1-D tensor: {explain(error)}"]) from error
    return part


def _try(part: OwnPart) -> None:
    """Steps a tensor whole, its two halves, and one that goes on from what a checkpoint would hold."""
    start, *grads = torch.randn(1 + TRIED_STEPS, TRIED_ELEMENTS, generator=torch.Generator().manual_seed(0)).unbind()
    whole, optimizer = _begin(part, start)
    _step(whole, optimizer, grads[:HALFWAY])
    resumed, other = _begin(part, whole.detach())
    kept = {key: value for key, value in optimizer.state.get(whole, {}).items() if laid_out(value, whole)}
    other.make_room(resumed, {key: value.dtype for key, value in kept.items()})
    for key, value in kept.items():
        other.state[resumed][key].copy_(value)
    other.set_scalars(optimizer.scalars())
    for flat, each in ((whole, optimizer), (resumed, other)):
        _step(flat, each, grads[HALFWAY:])
    halves = [_begin(part, half) for half in start.chunk(2)]
    for number, (flat, each) in enumerate(halves):
        _step(flat, each, [grad.chunk(2)[number] for grad in grads])
    if not torch.allclose(torch.cat([flat for flat, _ in halves]), whole, rtol=TOLERANCE, atol=TOLERANCE):
        raise ConfigError(
            [
                f"optim.name={part.name} gives other numbers where a tensor is cut in two: under ZeRO each rank "
                "updates parts of flattened parameters, so a rule must treat each element by itself, as AdamW and Lion "
                "do, and draw no random numbers"
            ]
        )
    if not torch.equal(resumed, whole):
        raise ConfigError(
            [
                f"optim.name={part.name} would not go on from a checkpoint as if nothing had been: what it remembers "
                "must lie in self.state[tensor], not in the optimizer itself or its groups"
            ]
        )


def _begin(part: OwnPart, values: Tensor) -> tuple[Tensor, OwnOptimizer]:
    flat = nn.Parameter(values.clone())
    optimizer = OwnOptimizer([{"params": [("tried", flat)], "role": "tried"}], part, lr=0.01, weight_decay=0.1)
    optimizer.shard({flat: FlatLayout(((),), 0, None)})
    return flat, optimizer


def _step(flat: Tensor, optimizer: OwnOptimizer, grads: Sequence[Tensor]) -> None:
    for grad in grads:
        flat.grad = grad.clone()
        optimizer.step()
