"""QK-Clip (Kimi K2, arXiv 2507.20534, section 2.1): attention logits bounded by scaling the weights that make them.

Shapes: L attention layers, H heads of each.

After the weight update, each head whose largest logit S of that very step exceeded tau has its query and key weights
scaled so that the same input would now give tau: by gamma = tau / S in all. How gamma is shared between weights is the
attention module's knowledge (``row_scales``); which modules there are and when to clip is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor


@runtime_checkable
class ClippableAttention(Protocol):
    """What an attention module offers, so that any architecture can be clipped."""

    @property
    def max_logits(self) -> Tensor:
        """[H] fp32: largest pre-softmax logit of each head since the last reset; -inf if there was none."""

    def reset_max_logits(self) -> None:
        """Starts a new step."""

    def row_scales(self, gamma_H: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """(weight, [rows] factors): what each row of a weight is multiplied with so that logits shrink by gamma."""


def clip_factors(max_logits: Tensor, *, tau: float) -> Tensor:
    """gamma: ``tau / S`` where S > tau, else exactly 1.

    A largest logit that is negative, -inf or NaN leaves the head alone, and so does +inf: the step that made it has
    no finite gradient and cannot be repaired by scaling.

    Args:
        max_logits: S, any shape.
        tau: threshold, positive.
    """
    above = (max_logits > tau) & torch.isfinite(max_logits)
    return torch.where(above, tau / max_logits.where(above, torch.ones_like(max_logits)), torch.ones_like(max_logits))


def scale_rows_(values: Tensor, scales: Tensor, *, start: int, columns: int) -> None:
    """Scales, in place, an interval of a flattened matrix by the factors of its rows.

    Args:
        values: 1-D, elements [start, start + len(values)) of the flattened matrix; may begin and end inside a row.
        scales: [rows] of the whole matrix.
        start: see ``values``.
        columns: of the matrix.
    """
    scales = scales.to(values.dtype)
    stop = start + len(values)
    first_whole, last_whole = -(-start // columns), stop // columns
    if first_whole > last_whole:  # inside a single row
        values.mul_(scales[start // columns])
        return
    head, tail = first_whole * columns - start, last_whole * columns - start
    if head:
        values[:head].mul_(scales[first_whole - 1])
    values[head:tail].view(-1, columns).mul_(scales[first_whole:last_whole, None])
    if tail < len(values):
        values[tail:].mul_(scales[last_whole])


class QKClip:
    """Watches attention layers and says by what their weights are to be scaled."""

    def __init__(
        self,
        layers: Sequence[tuple[str, ClippableAttention]],
        *,
        tau: float = 100.0,
        process_group: dist.ProcessGroup | None = None,
        observe_only: bool = False,
    ) -> None:
        """Nothing is measured yet.

        Args:
            layers: attention modules with their names; all of them with the same number of heads.
            tau: threshold on the largest logit; K2 used 100.
            process_group: ranks that saw other parts of the batch; None: all of torch.distributed, if it runs.
            observe_only: measure max logits but never scale.

        Raises:
            ValueError: tau is not positive, or a layer does not follow the protocol.
        """
        if not tau > 0:
            raise ValueError(f"tau={tau} must be positive: it is the largest logit that is left alone (K2: 100)")
        for name, layer in layers:
            if not isinstance(layer, ClippableAttention):
                raise ValueError(
                    f"{name} ({type(layer).__name__}) cannot be clipped: it needs max_logits, reset_max_logits() and "
                    "row_scales(gamma); see muonclip.qk_clip.ClippableAttention"
                )
        self.layers = list(layers)
        self.tau = tau
        self.observe_only = observe_only
        self._process_group = process_group
        self.gathered = False
        self.max_logits = torch.empty(len(self.layers), 0)
        self.gamma = torch.empty(len(self.layers), 0)
        self._scales: dict[int, Tensor] = {}

    def gather(self) -> None:
        """Takes the maxima of this step over all ranks, in one all-reduce, and computes gamma and row scales."""
        self.gathered = True
        if not self.layers:
            return
        maxima = torch.stack([layer.max_logits for _, layer in self.layers])
        if dist.is_initialized() and dist.get_world_size(self._process_group) > 1:
            # What MAX makes of a NaN is not defined: it travels as +inf.
            maxima = maxima.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self._process_group)
        self.max_logits = maxima
        self.gamma = torch.ones_like(maxima) if self.observe_only else clip_factors(maxima, tau=self.tau)
        self._scales = {}
        if not self.observe_only:
            for (_, layer), gamma_H in zip(self.layers, self.gamma, strict=True):
                for weight, scales in layer.row_scales(gamma_H):
                    self._scales[id(weight)] = scales

    def scales_of(self, parameter: Tensor) -> Tensor | None:
        """[rows] factors of a parameter's rows in this step; None for one that is never clipped."""
        return self._scales.get(id(parameter))

    def reset(self) -> None:
        """Starts a new step; ``max_logits`` and ``gamma`` stay readable until the next ``gather``."""
        self.gathered = False
        for _, layer in self.layers:
            layer.reset_max_logits()
