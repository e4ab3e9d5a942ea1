"""QK-Clip (Kimi K2, arXiv 2507.20534, section 2.1): attention logits bounded by scaling the weights that make them.

Shapes: L attention layers, H heads of a layer (the most that any has, where they differ).

After the weight update, each head whose largest logit S of that very step exceeded tau has its query and key weights
scaled so that the same input would now give tau: by gamma = tau / S in all, gamma^alpha on the query's side and
gamma^(1 - alpha) on the key's. Which rows of which weights that are is the attention module's knowledge
(``row_scales``); which modules there are and when to clip is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

K2_ALPHA = 0.5  # the square roots of arXiv 2507.20534, section 2.1


class ClippableAttention(Protocol):
    """What an attention module offers, so that any architecture can be clipped."""

    @property
    def max_logits(self) -> Tensor:
        """[H] fp32: largest pre-softmax logit of each head in the training forwards since the last reset.

        -inf if there was none, NaN or inf if a logit was. Every micro-batch counts, evaluation does not. A forward pass
        that activation checkpointing runs again finds the same maxima, and so changes nothing.
        """

    def reset_max_logits(self) -> None:
        """Starts a new step."""

    def row_scales(self, gamma_H: Tensor, *, alpha: float = K2_ALPHA) -> Iterable[tuple[Tensor, Tensor]]:
        """(parameter, [rows] factors): what each row is multiplied with so that head h's logits shrink by gamma_h.

        Where query and key of a head both belong to it alone, the query's rows take ``gamma ** alpha`` and the key's
        ``gamma ** (1 - alpha)``. Where heads share a key (grouped queries, the rope key of latent attention), scaling
        it would change the others' logits: the query takes all of gamma, whatever alpha is. It is passed only if it
        is not K2's: a module that shares by square roots alone needs no such argument.

        The parameters are those the optimizer got, not views of them; rows are the first dimension (a bias has one
        element a row). A gamma of 1 must give factors of exactly 1. A parameter that is named twice is scaled by both.
        """


PROTOCOL = ("max_logits", "reset_max_logits", "row_scales")


def clip_factors(max_logits: Tensor, *, tau: float) -> Tensor:
    """gamma: ``tau / S`` where S > tau, else exactly 1.

    A largest logit that is zero, negative, -inf or NaN leaves the head alone, and so does +inf: the step that made it
    has no finite gradient and cannot be repaired by scaling.

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
        alpha: float = K2_ALPHA,
        process_group: dist.ProcessGroup | None = None,
        observe_only: bool = False,
    ) -> None:
        """Nothing is measured yet.

        Args:
            layers: attention modules with their names.
            tau: threshold on the largest logit; K2 used 100. Infinite: nothing is ever scaled.
            alpha: exponent of gamma on the query's side, from 0 (all on the key) to 1 (all on the query); K2 used 0.5.
            process_group: ranks that saw other parts of the batch; None: all of torch.distributed, if it runs.
            observe_only: measure max logits but never scale.

        Raises:
            ValueError: tau or alpha is out of range, two layers have one name, or a layer does not follow the protocol.
        """
        if not tau > 0:
            raise ValueError(f"tau={tau} must be positive: it is the largest logit that is left alone (K2: 100)")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be from 0 to 1: it is the query's share of the clip (K2: 0.5)")
        if len({name for name, _ in layers}) < len(layers):
            raise ValueError(f"two layers have one name: {', '.join(name for name, _ in layers)}")
        for name, layer in layers:
            # Not isinstance() of the protocol: from Python 3.12 on it does not see a module's buffers.
            if missing := [member for member in PROTOCOL if not hasattr(layer, member)]:
                raise ValueError(
                    f"{name} ({type(layer).__name__}) cannot be clipped: it lacks {', '.join(missing)}; "
                    "see muonclip.qk_clip.ClippableAttention"
                )
            if alpha != K2_ALPHA and "alpha" not in signature(layer.row_scales).parameters:
                raise ValueError(
                    f"alpha={alpha}, but row_scales of {name} ({type(layer).__name__}) takes no alpha: write "
                    f"row_scales(self, gamma_H, *, alpha={K2_ALPHA}), or leave it at {K2_ALPHA}"
                )
        self.layers = list(layers)
        self.tau = tau
        self.alpha = alpha
        self.observe_only = observe_only
        self.gathered = False  # since the last reset
        # [L, H] each, with -inf, 1 and 1 for heads that a layer does not have.
        shape = len(self.layers), max((len(layer.max_logits) for _, layer in self.layers), default=0)
        self.max_logits = torch.full(shape, -math.inf)  # of the last gather; +inf where one was NaN or infinite
        self.gamma = torch.ones(shape)  # by which the last step scaled logits; exactly 1 where it did not
        self.cumulative = torch.ones(shape)  # the product of gamma over all steps
        self._process_group = process_group
        self._scales: dict[int, Tensor] = {}
        self._applied = False  # since the last gather

    @property
    def scales_weights(self) -> bool:
        """Whether any step can change a weight."""
        return not self.observe_only and math.isfinite(self.tau)

    @property
    def invalid(self) -> Tensor:
        """[L, H]: heads that were left alone at the last gather as their largest logit was NaN or infinite."""
        return self.max_logits.isposinf()

    @torch.no_grad()
    def gather(self) -> None:
        """Takes the maxima of this step over all ranks, in one all-reduce, and computes gamma and row scales.

        All ranks of the process group must call it. A NaN is reported as +inf.
        """
        self.gathered, self._applied = True, False
        if not self.layers:
            return
        maxima = [layer.max_logits.float() for _, layer in self.layers]
        largest = pad_sequence(maxima, batch_first=True, padding_value=-math.inf)
        # What a MAX over ranks makes of a NaN is not defined.
        largest = largest.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self._process_group) > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._process_group)
        self.max_logits = largest
        self.cumulative = self.cumulative.to(largest.device)
        self.gamma = clip_factors(largest, tau=self.tau) if self.scales_weights else torch.ones_like(largest)
        self._scales = {}
        if self.scales_weights:
            heads = [len(maximum) for maximum in maxima]
            for _, weight, scales in self._row_scales(g[:H] for g, H in zip(self.gamma, heads, strict=True)):
                earlier = self._scales.get(id(weight))
                self._scales[id(weight)] = scales if earlier is None else earlier * scales

    def apply(self) -> None:
        """Notes that this step is being applied, in however many parts; the optimizer calls it."""
        if self.gathered and not self._applied:
            self._applied = True
            self.cumulative = self.cumulative * self.gamma

    def reset(self) -> None:
        """Starts a new step. What was gathered stays readable until the next; without an applied step gamma is 1."""
        if self.gathered and not self._applied:
            self.gamma = torch.ones_like(self.gamma)
        self.gathered = False
        for _, layer in self.layers:
            layer.reset_max_logits()

    def state_dict(self) -> dict[str, Tensor]:
        """The cumulative scales [H] of each layer, by name: all that outlives a step."""
        return {
            name: scales[: len(layer.max_logits)].clone()
            for (name, layer), scales in zip(self.layers, self.cumulative, strict=True)
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Takes back what ``state_dict`` gave.

        Raises:
            ValueError: it is of other layers, or of layers with other heads.
        """
        own = {name: len(layer.max_logits) for name, layer in self.layers}
        found = {name: len(scales) for name, scales in state_dict.items()}
        if found != own:
            raise ValueError(f"the state is of layers with heads {found}, but here are {own}")
        for (name, heads), scales in zip(own.items(), self.cumulative, strict=True):
            scales[:heads] = state_dict[name]

    def scales_of(self, parameter: Tensor) -> Tensor | None:
        """[rows] factors of a parameter's rows in this step; None for one that is never clipped."""
        return self._scales.get(id(parameter))

    @torch.no_grad()
    def check_weights(self, names: dict[int, str]) -> None:
        """Refuses layers whose weights would not be reached.

        Args:
            names: of the parameters that an optimizer updates, by id.

        Raises:
            ValueError: a layer wants to scale what is none of them, or gives the wrong number of factors.
        """
        if not self.scales_weights:
            return
        for layer, weight, scales in self._row_scales(torch.ones_like(x.max_logits) for _, x in self.layers):
            if id(weight) not in names:
                raise ValueError(
                    f"row_scales of {layer} names a tensor of shape {list(weight.shape)} that the optimizer does not "
                    "update: give it the parameter itself (not a view), and give that to the optimizer"
                )
            if scales.shape != weight.shape[:1]:
                raise ValueError(
                    f"row_scales of {layer} gives factors of shape {list(scales.shape)} for {names[id(weight)]} of "
                    f"shape {list(weight.shape)}: one for each row is needed"
                )

    def _row_scales(self, gammas: Iterable[Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        shares = {} if self.alpha == K2_ALPHA else {"alpha": self.alpha}
        for (name, layer), gamma_H in zip(self.layers, gammas, strict=True):
            for weight, scales in layer.row_scales(gamma_H, **shares):
                yield name, weight, scales
