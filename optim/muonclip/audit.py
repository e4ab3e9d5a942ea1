"""What a step did to each parameter, read off the weights and held against theory.

Nothing that the optimizer says of itself is used but its state: the update is the difference of the weights before and
after, without decay and without the clip. Muon's is compared by singular values, which the polynomial of Newton-Schulz
maps one by one, whatever the singular vectors are; AdamW's by element with the formula. All in float64.

Shapes: m rows and n columns of a matrix, K = min(m, n) of its singular values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from muonclip.optimizer import MuonClip
from muonclip.orthogonalize import Coefficients
from muonclip.plan import Matrix, Piece, Traffic
from muonclip.qk_clip import scale_rows_

UPDATE_RMS = 0.2  # Moonlight (arXiv 2502.16982), section 2.2: what the scale makes of an orthogonal matrix
# Of a singular value of the orthogonalised matrix, in float32. In bfloat16 rounding turns zeros into singular values
# that are not small (each of the first steps multiplies them by 3.4): only the largest one and the RMS are held.
TOLERANCE = 0.01
LARGEST_BFLOAT16 = 1.3
RMS_SLACK_BFLOAT16 = 0.1
# Of AdamW's update, whose size is about 1.
TOLERANCE_ADAMW = 1e-3


@dataclass(frozen=True)
class Rule:
    """How a parameter is updated."""

    name: str
    role: str  # of its group, if the caller gave one
    shape: tuple[int, ...]  # as this rank's optimizer sees it: of a stack, the experts that are here
    algorithm: str
    lr: float
    weight_decay: float
    matrices: tuple[tuple[int, int], ...]  # that are orthogonalised, each by itself; none for AdamW

    @property
    def scales(self) -> tuple[float, ...]:
        """What an orthogonal update of each matrix is multiplied with, before the learning rate."""
        return tuple(UPDATE_RMS * math.sqrt(max(matrix)) for matrix in self.matrices)


@dataclass(frozen=True)
class MatrixUpdate:
    """Of one matrix: singular values are those of its update over the scale, hence near 1."""

    name: str
    number: int  # among the parameter's
    orthogonalized: int  # how often, on the rank that did it
    singular: tuple[float, float]  # smallest and largest
    expected: tuple[float, float]  # of the polynomial of the momentum's
    error: float  # largest difference of any singular value
    noise: float  # what rounding of the weights may add to it
    rms: float  # of the update, before the learning rate
    expected_rms: float
    exact: bool  # momentum, exchange and Newton-Schulz in float32 or better

    def fault(self) -> str | None:
        """What is wrong, if anything."""
        if self.orthogonalized != 1:
            return f"orthogonalised {self.orthogonalized} times"
        if not math.isfinite(self.error):
            return "not finite"
        if self.exact:
            return f"singular values off by {self.error:.2g}" if self.error > TOLERANCE + self.noise else None
        if self.singular[1] > LARGEST_BFLOAT16 + self.noise:
            return f"singular value {self.singular[1]:.3g} above {LARGEST_BFLOAT16}"
        if self.rms < (1 - RMS_SLACK_BFLOAT16) * self.expected_rms:
            return f"RMS {self.rms:.3g}, expected {self.expected_rms:.3g}"
        return None


@dataclass(frozen=True)
class ElementUpdate:
    """Of the elements of an AdamW parameter that this rank holds; sums can be added over ranks."""

    name: str
    elements: int
    squares: float  # of the update, before the learning rate
    expected_squares: float
    error_squares: float  # of the difference
    noise_squares: float  # what rounding of the weights may add to it


def rules(optimizer: MuonClip) -> list[Rule]:
    """How each parameter is updated by the groups as they are now, in their order."""
    return [
        Rule(
            name,
            str(group.get("role", group["algorithm"])),
            shape,
            group["algorithm"],
            group["lr"],
            group["weight_decay"],
            tuple(optimizer.matrix_shapes(name)) if group["algorithm"] == "muon" else (),
        )
        for group in optimizer.param_groups
        for name, shape in _shapes(optimizer, group).items()
    ]


@dataclass(frozen=True)
class Exchanged:
    """How the matrices of a flat tensor are shared out and come together in a step."""

    role: str  # of its group, if the caller gave one
    matrices: tuple[Matrix, ...]  # with owners, and the interval that each rank of the group holds
    rounds: int
    costs: tuple[float, ...]  # of Newton-Schulz by rank, in multiply-adds
    traffic: tuple[Traffic, ...]  # by rank, in bytes


def exchanges(optimizer: MuonClip) -> list[Exchanged]:
    """Of each tensor whose matrices are orthogonalised, as this rank sees it; experts of other ranks are in none."""
    found = []
    for tensor, group in optimizer.tensors():
        if group["algorithm"] != "muon":
            continue
        exchange = optimizer.exchange(tensor, group)
        plan, size = exchange.plan, exchange.dtype.itemsize
        traffic = tuple(Traffic(*(size * n for n in astuple(rank))) for rank in plan.traffic())
        role = str(group.get("role", group["algorithm"]))
        found.append(Exchanged(role, tuple(plan.matrices), len(plan.rounds), tuple(plan.costs), traffic))
    return found


class StepAudit:
    """Measures the first step of an optimizer, in a plain loop or on shards: ``with StepAudit(optimizer) as audit:``.

    The block holds one whole step, by whatever calls it. On shards all ranks enter together. It costs a copy of the
    weights, and a singular value decomposition of each matrix.
    """

    def __init__(self, optimizer: MuonClip) -> None:
        """Measures nothing yet.

        Raises:
            ValueError: steps were taken before: only after the first is the momentum the direction of the update.
        """
        for tensor, group in optimizer.tensors():
            if group["algorithm"] == "muon" and optimizer.state[tensor]["momentum"].any():
                raise ValueError("an audit looks at the first step, but there is momentum from earlier ones")
        self._optimizer = optimizer
        self.matrices: list[MatrixUpdate] = []  # those that this rank orthogonalised
        self.elements: list[ElementUpdate] = []
        self._before: dict[Tensor, Tensor] = {}
        self._counts: Counter[tuple[str, int]] = Counter()

    def __enter__(self) -> StepAudit:
        self._before = {tensor: tensor.detach().clone() for tensor, _ in self._optimizer.tensors()}
        self._counts = self._optimizer.orthogonalized = Counter()
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._optimizer.orthogonalized = None
        if kind is not None:
            return
        for tensor, group in self._optimizer.tensors():
            if group["algorithm"] == "muon":
                self._measure_matrices(tensor, group)
            else:
                self._measure_elements(tensor, group)
        self._before.clear()

    def _update(self, tensor: Tensor, group: Mapping[str, Any]) -> Tensor:
        """What was subtracted, over the learning rate, in float64 and in the shape of the tensor."""
        after = tensor.detach().double().flatten()
        for piece in self._pieces(tensor):
            if (scales := self._optimizer.clip_scales(piece.name)) is not None:
                interval = after[piece.offset : piece.offset + piece.stop - piece.start]
                inverse = 1 / scales.to(after.device, torch.float64)  # shards may lie on the CPU (offload)
                scale_rows_(interval, inverse, start=piece.start, columns=math.prod(piece.shape[1:]))
        kept = self._before[tensor].double() * (1 - group["lr"] * group["weight_decay"])
        update: Tensor = (kept - after.view_as(kept)) / group["lr"]
        return update

    def _pieces(self, tensor: Tensor) -> tuple[Piece, ...]:
        layout = self._optimizer.layout_of(tensor)
        return layout.pieces_by_rank[layout.rank]

    def _measure_matrices(self, tensor: Tensor, group: Mapping[str, Any]) -> None:
        update, momentum = self._update(tensor, group), self._optimizer.state[tensor]["momentum"].double()
        weight = self._before[tensor].double()
        rounding = torch.finfo(tensor.dtype).eps / group["lr"]
        exchange = self._optimizer.exchange(tensor, group)
        sent = [group["exchange_dtype"]] if exchange.plan.rounds else []
        kept = self._optimizer.state[tensor]["momentum"].dtype
        exact = torch.bfloat16 not in (group["newton_schulz_dtype"], kept, *sent)
        together = [exchange.whole(values.flatten()) for values in (update, momentum, weight)]
        for (name, number), found, direction, old in zip(exchange.owned, *together, strict=True):
            scale = UPDATE_RMS * math.sqrt(max(found.shape))
            singular = _singular_values(found / scale)
            expected = orthogonalized_singular_values(direction, group["newton_schulz_coefficients"])
            self.matrices.append(
                MatrixUpdate(
                    name,
                    number,
                    orthogonalized=self._counts[name, number],
                    singular=(float(singular[-1]), float(singular[0])),
                    expected=(float(expected[-1]), float(expected[0])),
                    error=float((singular - expected).abs().max()),
                    # The largest singular value of noise: its size times the roots of both sides, at most.
                    noise=rounding * float(old.abs().max()) * sum(side**0.5 for side in found.shape) / scale,
                    rms=_rms(singular, found.numel()) * scale,
                    expected_rms=_rms(expected, found.numel()) * scale,
                    exact=exact,
                )
            )

    def _measure_elements(self, tensor: Tensor, group: Mapping[str, Any]) -> None:
        update, state = self._update(tensor, group).flatten(), self._optimizer.state[tensor]
        steps = float(state["step"])
        mean, square = (
            state[key].double().flatten() / (1 - beta**steps if steps else 1)
            for key, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True)
        )
        expected = mean / (square.sqrt() + group["eps"])
        noise = torch.finfo(tensor.dtype).eps / group["lr"] * self._before[tensor].double().flatten()
        for piece in self._pieces(tensor):
            part = slice(piece.offset, piece.offset + piece.stop - piece.start)
            values = (update[part], expected[part], update[part] - expected[part], noise[part])
            squares = (float(v.square().sum()) for v in values)
            self.elements.append(ElementUpdate(piece.name, piece.stop - piece.start, *squares))


def _shapes(optimizer: MuonClip, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of a group's parameters, in the order of their flat tensors."""
    layouts = [optimizer.layout_of(tensor) for tensor, its_group in optimizer.tensors() if its_group is group]
    return {piece.name: piece.shape for layout in layouts for pieces in layout.pieces_by_rank for piece in pieces}


def orthogonalized_singular_values(matrix: Tensor, coefficients: Coefficients) -> Tensor:
    """[K] in falling order: what Newton-Schulz makes of a matrix's singular values, by the polynomial alone.

    Args:
        matrix: [m, n] float64.
        coefficients: a, b, c of each step.
    """
    values = _singular_values(matrix)
    values = values / values.norm().clamp_min(torch.finfo(values.dtype).tiny)
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    mapped: Tensor = values.abs().sort(descending=True).values
    return mapped


def _singular_values(matrix: Tensor) -> Tensor:
    """[K] in falling order; NaN of what is not finite, on which the decomposition would fail."""
    if not matrix.isfinite().all():
        return matrix.new_full((min(matrix.shape),), math.nan)
    values: Tensor = torch.linalg.svdvals(matrix)
    return values


def adamw_rms(update: Sequence[ElementUpdate]) -> tuple[float, float]:
    """The RMS of an AdamW parameter's update and the expected one, from its parts on all ranks."""
    elements = sum(part.elements for part in update)
    sums = sum(part.squares for part in update), sum(part.expected_squares for part in update)
    return math.sqrt(sums[0] / elements), math.sqrt(sums[1] / elements)


def adamw_fault(update: Sequence[ElementUpdate]) -> str | None:
    """What is wrong with an AdamW parameter's update, from its parts on all ranks."""
    elements = sum(part.elements for part in update)
    error = math.sqrt(sum(part.error_squares for part in update) / elements)
    noise = math.sqrt(sum(part.noise_squares for part in update) / elements)
    return None if error <= TOLERANCE_ADAMW + noise else f"off by {error:.2g} (RMS)"


def _rms(singular: Tensor, elements: int) -> float:
    return math.sqrt(float(singular.square().sum()) / elements)
