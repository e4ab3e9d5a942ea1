"""MuonClip (Kimi K2, arXiv 2507.20534, algorithm 1) as one torch optimizer for all parameters of a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from muonclip.orthogonalize import QUINTIC, Coefficients, orthogonalize_each
from muonclip.ownership import newton_schulz_cost
from muonclip.plan import Piece
from muonclip.qk_clip import QKClip, scale_rows_
from muonclip.sharded import Exchange, FlatLayout, Passage, Work, plan_exchanges
from muonclip.update import adamw_, adamw_update, apply_updates_, momentum_directions, muon_scale

ALGORITHMS = ("muon", "adamw")


class MuonClip(torch.optim.Optimizer):
    """Muon on matrices, AdamW on the rest, QK-Clip after both; in a plain loop or on the shards of ZeRO.

    State of each tensor, created at once: ``momentum`` (muon), or ``exp_avg``, ``exp_avg_sq`` and ``step`` (adamw; the
    updates it got), in float32 whatever the parameters are in (float64 for float64), but for a momentum that was asked
    for in bfloat16. It may be written to in place.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        momentum_dtype: torch.dtype = torch.float32,
        newton_schulz_coefficients: Coefficients = QUINTIC,
        newton_schulz_dtype: torch.dtype = torch.float32,
        newton_schulz_gram: bool = False,
        exchange_dtype: torch.dtype = torch.float32,
        exchange_buffer_bytes: int = 2**29,
        split: Mapping[str, Sequence[int]] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        qk_clip: QKClip | None = None,
    ) -> None:
        """Takes parameter groups; each may override lr, weight_decay and the other numbers.

        Args:
            groups: dicts with ``params``, a list of (name, parameter), and ``algorithm``, "muon" for matrices [m, n]
                and stacks of them [E, m, n] (an expert each), or "adamw". Other keys are kept as they are. See
                ``split_parameters``.
            lr: learning rate of groups without their own.
            weight_decay: decoupled, times lr.
            momentum: mu of Muon.
            nesterov: Moonlight's form; False is K2's algorithm as printed.
            momentum_dtype: float32, or bfloat16 for half the memory.
            newton_schulz_coefficients: a, b, c of each iteration.
            newton_schulz_dtype: in which they are computed.
            newton_schulz_gram: the cheaper form for matrices at least three times as long as wide; see
                ``newton_schulz``.
            exchange_dtype: in which matrices that straddle shards travel, and their updates back: float32, so that any
                layout gives the numbers of one process, or bfloat16 for half the bytes.
            exchange_buffer_bytes: what a rank may hold for that at a time; a matrix that needs more travels alone.
            split: by name, the rows of the matrices that lie one after the other in a parameter (in each matrix of a
                stack), such as (n_q, n_k, n_v) of a fused projection or (head_dim,) * heads: each is orthogonalised and
                scaled on its own.
            betas: of AdamW.
            eps: of AdamW.
            qk_clip: what bounds attention logits; None: nothing does.

        Raises:
            ValueError: a parameter or number that the algorithm cannot take, named.
        """
        self.qk_clip = qk_clip
        self._parameters: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}  # of parameters by id; those given here, also after ``shard``
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._split = {name: tuple(rows) for name, rows in (split or {}).items()}
        self._layouts: dict[Tensor, FlatLayout] = {}
        self._exchanges: dict[Tensor, Exchange] = {}
        self._group_of: dict[Tensor, int] = {}  # of each flat tensor
        # How often each matrix (parameter, number in it) was orthogonalised on this rank, while it is a Counter.
        self.orthogonalized: Counter[tuple[str, int]] | None = None
        # Told of each shard that is stepped, of its gradient and of its update (before the learning rate, without decay
        # and clip), while it is there.
        self.watch: Callable[[Tensor, Tensor, Tensor], None] | None = None
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "momentum_dtype": momentum_dtype,
            "newton_schulz_coefficients": tuple(map(tuple, newton_schulz_coefficients)),
            "newton_schulz_dtype": newton_schulz_dtype,
            "newton_schulz_gram": newton_schulz_gram,
            "exchange_dtype": exchange_dtype,
            "exchange_buffer_bytes": exchange_buffer_bytes,
            "betas": tuple(betas),
            "eps": eps,
        }
        super().__init__([dict(group) for group in groups], defaults)
        if unknown := sorted(self._split.keys() - self._shapes.keys()):
            raise ValueError(f"split names {unknown[0]}, which is no parameter of this optimizer")
        if qk_clip is not None:
            qk_clip.check_weights(self._names)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds one group, in the form the constructor takes, and creates its state.

        Raises:
            ValueError: see the constructor.
        """
        entries = param_group["params"] = list(param_group["params"])
        _check_group({**self.defaults, **param_group})
        for name, parameter in entries:
            if id(parameter) in self._names:
                raise ValueError(f"{self._names[id(parameter)]} and {name} are one tensor (tied, or given twice)")
            if name in self._parameters:
                raise ValueError(f"two parameters are named {name}: names must be unique")
            if name in self._split:
                _check_split(name, parameter, self._split[name], algorithm=param_group["algorithm"])
            self._parameters[name], self._names[id(parameter)] = parameter, name
            self._shapes[name] = tuple(parameter.shape)
        super().add_param_group(param_group)
        for _, parameter in entries:
            self._create_state(parameter, param_group)

    def shard(self, layouts: Mapping[Tensor, FlatLayout], *, relief: Mapping[int, int] | None = None) -> None:
        """Goes over to flat shards: each group's ``params`` are now 1-D tensors that hold intervals of parameters.

        State is created anew, on the shards. ``step`` may then be called for all tensors or for some at a time (ZeRO
        calls it with ``param_groups`` cut to one group, or with all ``params`` but one emptied), by all ranks in the
        same order.

        Args:
            layouts: of each flat tensor in the groups.
            relief: of each rank, the first rank of the smallest group that it shares out work in, where the caller
                knows; None: the ranks tell each other.

        Raises:
            ValueError: a group has no tensor or one without a layout, or the layouts leave out a trained parameter or
                disagree with what the constructor was given.
        """
        self.state.clear()
        self._layouts, self._exchanges, self._group_of = {}, {}, {}
        for number, group in enumerate(self.param_groups):
            lacking = [list(flat.shape) for flat in group["params"] if flat not in layouts]
            if lacking or not group["params"]:
                raise ValueError(
                    f"every group must hold flat tensors that have layouts, but group {number} has "
                    f"{f'tensors of shapes {lacking} without one' if lacking else 'no tensor'}: "
                    "put its shards into its params, and give shard() a FlatLayout for each"
                )
            for flat in group["params"]:
                self._group_of[flat] = number
        for flat, group in self.tensors():
            layout = layouts[flat]
            for piece in (piece for pieces in layout.pieces_by_rank for piece in pieces):
                if self._shapes.get(piece.name) != piece.shape:
                    known = self._shapes.get(piece.name, "no parameter of this optimizer")
                    raise ValueError(f"the layout gives {piece.name} the shape {piece.shape}, but it is {known}")
            for piece in layout.pieces_by_rank[layout.rank]:
                if piece.offset + piece.stop - piece.start > flat.numel():
                    raise ValueError(f"the layout puts {piece} past the end of a shard of {flat.numel()} elements")
            self._layouts[flat] = layout
            self._create_state(flat, group)
        held = {piece.name for x in self._layouts.values() for pieces in x.pieces_by_rank for piece in pieces}
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and parameter.numel() and name not in held:
                raise ValueError(f"{name} is in no layout: it would never be trained")
        muon = [(flat, group) for flat, group in self.tensors() if group["algorithm"] == "muon"]
        works = [_work(flat, self._layouts[flat], group) for flat, group in muon]
        exchanges = plan_exchanges(works, self._split, relief=relief)
        self._exchanges = dict(zip((flat for flat, _ in muon), exchanges, strict=True))

    def tensors(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """All that is updated, each tensor with its group; also shards that ``params`` lacks between steps (ZeRO-3)."""
        if self._group_of:
            return [(flat, self.param_groups[number]) for flat, number in self._group_of.items()]
        return [(tensor, group) for group in self.param_groups for tensor in group["params"]]

    def layout_of(self, tensor: Tensor) -> FlatLayout:
        """Which parameters, or parts of them, one of ``tensors`` holds."""
        if tensor in self._layouts:
            return self._layouts[tensor]
        name = self._names[id(tensor)]
        return FlatLayout(((Piece(name, self._shapes[name], 0, tensor.numel(), 0),),), 0, None)

    def exchange(self, tensor: Tensor, group: Mapping[str, Any]) -> Exchange:
        """What brings together the matrices of one of ``tensors``, which belongs to ``group``."""
        if tensor in self._exchanges:
            return self._exchanges[tensor]
        return plan_exchanges([_work(tensor, self.layout_of(tensor), group)], self._split)[0]

    def matrix_shapes(self, name: str) -> list[tuple[int, int]]:
        """Rows and columns of the matrices that a parameter consists of: experts of a stack, blocks of a split."""
        *stack, rows, columns = self._shapes[name]
        return [(block, columns) for block in self._split.get(name, (rows,))] * math.prod(stack)

    def clip_scales(self, name: str) -> Tensor | None:
        """[rows] factors by which the last step clipped a parameter; None for one that is never clipped."""
        return self._scales_of(self._parameters[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, then QK-Clip.

        The clip uses the largest logits since its last ``reset``. Unless the caller has gathered them already (and
        will reset them), they are gathered and reset here. Gradients must be finite: that is the caller's to see to.

        Raises:
            ValueError: a closure was given, a gradient is sparse, or groups were replaced without ``shard``.
        """
        if closure is not None:
            raise ValueError("MuonClip takes no closure: call backward() first, then step()")
        clip = self.qk_clip
        gather_here = clip is not None and not clip.gathered
        if clip is not None and gather_here:
            if sum(len(group["params"]) for group in self.param_groups) < len(self._layouts):
                raise ValueError("step() for some of the groups: call qk_clip.gather() before the first of them")
            clip.gather()
        if clip is not None:
            clip.apply()
        if self._layouts:
            self._step_shards([(flat, group) for group in self.param_groups for flat in group["params"]])
        else:
            for group in self.param_groups:
                self._step_whole(group)
        if clip is not None and gather_here:
            clip.reset()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any torch optimizer, but the state keeps its precision: torch casts it to that of the parameters.

        Raises:
            ValueError: state is missing or of another shape.
        """
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        for number, (parameter, group) in zip(saved, own, strict=True):
            self._create_state(parameter, group)
            found = state_dict["state"].get(number, {})
            for key, values in self.state[parameter].items():
                if key not in found or found[key].shape != values.shape:
                    raise ValueError(
                        f"the state dict has no {key} of shape {list(values.shape)} for parameter {number}"
                    )
                values.copy_(found[key])

    def _step_whole(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        grads = [self._gradient(p) for p in params]
        states = [self._state_of(p) for p in params]
        if params and group["algorithm"] == "muon":
            directions = momentum_directions(
                grads, [s["momentum"] for s in states], momentum=group["momentum"], nesterov=group["nesterov"]
            )
            splits = [self._split.get(self._names[id(p)]) for p in params]
            apply_updates_(
                _matrices(params, splits),
                self._muon_updates(_matrices(directions, splits), self._matrices_of(params), group=group),
                lr=group["lr"],
                weight_decay=group["weight_decay"],
            )
        elif params:
            _adamw(params, grads, states, group)
        for parameter in group["params"]:  # also of weights that had no gradient: their logits were too large
            if (scales := self._scales_of(parameter)) is not None:
                parameter.mul_(scales.view(-1, *[1] * (parameter.ndim - 1)))

    def _step_shards(self, shards: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
        """All at once, so that a rank waits for the results of others only when it has done its own part of all."""
        passages: list[tuple[Tensor, Tensor, dict[str, Any], Passage]] = []
        for flat, group in shards:
            state, grad = self._state_of(flat), flat.grad
            assert grad is not None, "a shard always has a gradient: all ranks must take part in the exchange"
            if group["algorithm"] == "muon":
                (direction,) = momentum_directions(
                    [grad], [state["momentum"]], momentum=group["momentum"], nesterov=group["nesterov"]
                )
                update = direction.to(self._device_of(flat))  # what it was, where that is the same device
                if update is state["momentum"]:
                    update = update.clone()
                passages.append((flat, update, group, self._exchanges[flat].begin(update)))
            else:
                _adamw([flat], [grad], [state], group)
                if self.watch is not None:
                    self.watch(flat, grad, adamw_update(state, betas=group["betas"], eps=group["eps"]))
        for _, _, group, passage in passages:
            passage.work(partial(self._muon_updates, group=group))
        for flat, update, group, passage in passages:
            passage.finish()
            update = update.to(flat.device)
            apply_updates_([flat], [update], lr=group["lr"], weight_decay=group["weight_decay"])
            if self.watch is not None:
                assert flat.grad is not None
                self.watch(flat, flat.grad, update)
        for flat, _ in shards:
            layout = self._layouts[flat]
            for piece in layout.pieces_by_rank[layout.rank]:
                if (scales := self._scales_of(self._parameters[piece.name])) is not None:
                    interval = flat[piece.offset : piece.offset + piece.stop - piece.start]
                    columns = math.prod(piece.shape[1:])
                    scale_rows_(interval, scales.to(flat.device), start=piece.start, columns=columns)

    def _device_of(self, flat: Tensor) -> torch.device:
        """Where matrices are multiplied: with the weights, also when masters and momentum lie elsewhere (offload)."""
        held = next(pieces for pieces in self._layouts[flat].pieces_by_rank if pieces)
        return self._parameters[held[0].name].device

    def _muon_updates(
        self, directions: Sequence[Tensor], matrices: Sequence[tuple[str, int]], *, group: Mapping[str, Any]
    ) -> list[Tensor]:
        updates = muon_updates(directions, group)
        if self.orthogonalized is not None:
            self.orthogonalized.update(matrix for matrix, _ in zip(matrices, updates, strict=True))
        return updates

    def _matrices_of(self, params: Sequence[Tensor]) -> list[tuple[str, int]]:
        names = [self._names[id(p)] for p in params]
        return [(name, number) for name in names for number in range(len(self.matrix_shapes(name)))]

    def _scales_of(self, parameter: Tensor) -> Tensor | None:
        return None if self.qk_clip is None else self.qk_clip.scales_of(parameter)

    def _gradient(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        if parameter.grad.layout != torch.strided:
            name = self._names.get(id(parameter), "a parameter")
            raise ValueError(f"the gradient of {name} is sparse: build its module with sparse=False")
        return parameter.grad

    def _state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        if tensor not in self.state:
            raise ValueError(
                f"a tensor of shape {list(tensor.shape)} has no state: after something (ZeRO) has replaced the "
                "parameters in param_groups, call shard() with the layout of what is there now"
            )
        state: dict[str, Tensor] = self.state[tensor]
        return state

    def _create_state(self, tensor: Tensor, group: Mapping[str, Any]) -> None:
        names = ("momentum",) if group["algorithm"] == "muon" else ("exp_avg", "exp_avg_sq")
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        if group["algorithm"] == "muon" and group["momentum_dtype"] == torch.bfloat16:
            dtype = torch.bfloat16
        state = {n: torch.zeros_like(tensor, dtype=dtype, requires_grad=False) for n in names}
        if group["algorithm"] == "adamw":
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        self.state[tensor] = state


def muon_updates(directions: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
    """Muon's update of each direction [m, n]: orthogonalised and scaled, not yet times the learning rate."""
    orthogonal = orthogonalize_each(
        directions,
        coefficients=group["newton_schulz_coefficients"],
        dtype=group["newton_schulz_dtype"],
        gram=group["newton_schulz_gram"],
    )
    return [o.to(d.dtype).mul_(muon_scale(d.shape[0], d.shape[1])) for o, d in zip(orthogonal, directions, strict=True)]


def _work(tensor: Tensor, layout: FlatLayout, group: Mapping[str, Any]) -> Work:
    steps, gram, dtype = len(group["newton_schulz_coefficients"]), group["newton_schulz_gram"], group["exchange_dtype"]
    if dtype == torch.float32:
        dtype = torch.promote_types(dtype, tensor.dtype)  # float64 stays what it is
    return Work(layout, partial(newton_schulz_cost, steps=steps, gram=gram), dtype, group["exchange_buffer_bytes"])


def _matrices(tensors: Sequence[Tensor], splits: Sequence[Sequence[int] | None]) -> list[Tensor]:
    """[m, n] each, views, so that what is done to them is done to the tensors.

    Args:
        tensors: [m, n], or stacks [E, m, n], which are E matrices.
        splits: rows of the matrices that each is to be cut into; None: it stays whole.
    """
    found: list[Tensor] = []
    for tensor, rows in zip(tensors, splits, strict=True):
        for matrix in tensor.unbind() if tensor.ndim == 3 else (tensor,):
            found += (matrix,) if rows is None else torch.split(matrix, list(rows))
    return found


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


def _check_group(group: Mapping[str, Any]) -> None:
    for entry in group["params"]:
        if not isinstance(entry, tuple) or len(entry) != 2:
            raise ValueError("params must be (name, parameter) pairs, as model.named_parameters() gives them")
    if not group["params"]:
        raise ValueError("a group has no parameters: leave it out")
    where = f"in the group of {group['params'][0][0]}"
    algorithm = group.get("algorithm")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} {where} must be one of {', '.join(ALGORITHMS)}")
    for name, parameter in group["params"]:
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is {parameter.dtype}: only real floating-point parameters can be trained")
        if algorithm == "muon" and (parameter.ndim not in (2, 3) or not parameter.numel()):
            raise ValueError(
                f"{name} has shape {list(parameter.shape)}: Muon takes matrices [m, n] and stacks of them "
                "[E, m, n]; give it to a group with algorithm='adamw'"
            )
    numbers = [(key, group[key], math.inf) for key in ("lr", "weight_decay", "eps")]
    numbers += [(key, beta, 1.0) for key, beta in zip(("betas[0]", "betas[1]"), group["betas"], strict=True)]
    for key, value, high in [*numbers, ("momentum", group["momentum"], 1.0)]:
        if not 0 <= value < high:
            raise ValueError(f"{key}={value} {where} must be at least 0 and below {high}")
    coefficients = group["newton_schulz_coefficients"]
    if not coefficients or any(len(abc) != 3 or not all(map(math.isfinite, abc)) for abc in coefficients):
        raise ValueError(
            f"newton_schulz_coefficients={coefficients} {where} must be three numbers (a, b, c) for each step, "
            "such as muonclip.QUINTIC"
        )
    if group["momentum_dtype"] not in (torch.float32, torch.bfloat16):
        raise ValueError(f"momentum_dtype={group['momentum_dtype']} {where} must be torch.float32 or torch.bfloat16")
    if group["newton_schulz_dtype"] not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(
            f"newton_schulz_dtype={group['newton_schulz_dtype']} {where} must be torch.float32, torch.bfloat16 or "
            "torch.float64"
        )
    if group["exchange_dtype"] not in (torch.float32, torch.bfloat16):
        raise ValueError(f"exchange_dtype={group['exchange_dtype']} {where} must be torch.float32 or torch.bfloat16")
    if group["exchange_buffer_bytes"] < 1:
        raise ValueError(
            f"exchange_buffer_bytes={group['exchange_buffer_bytes']} {where} must be positive, such as 2**29"
        )


def _check_split(name: str, parameter: Tensor, rows: Sequence[int], *, algorithm: str) -> None:
    if algorithm != "muon":
        raise ValueError(f"split names {name}, whose algorithm is {algorithm}: only Muon has matrices to split")
    if min(rows, default=0) < 1 or sum(rows) != parameter.shape[-2]:
        raise ValueError(
            f"split cuts {name} into {list(rows)} rows, but it has {parameter.shape[-2]}: give positive numbers that "
            "add up to that"
        )
