"""Sigmoid router with a selection bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; ``noaux_tc`` in its config).

Shapes: B sequences, T tokens of each, N = B*T tokens, D model, E experts, K experts a token, G groups of experts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2train.config import ModelConfig
from k2train.model.float32 import Float32Buffers, counts
from k2train.model.sequence import SequenceParallel


class _WideLinear(torch.autograd.Function):
    """``x W^T`` in fp32 of narrower tensors, which alone are kept: at K2's width the wide tokens take 28 KB each."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_ED)
        return torch.mm(*_widened(x_ND, weight_ED.t()))

    @staticmethod
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, weight_ED = ctx.saved_tensors
        wide_ND, wide_ED = _widened(x_ND, weight_ED)
        return torch.mm(grad_NE, wide_ED).to(x_ND.dtype), torch.mm(grad_NE.t(), wide_ND).to(weight_ED.dtype)


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def select(scores_NE: Tensor, bias_E: Tensor, *, top_k: int, n_group: int, topk_group: int) -> Tensor:
    """The experts of each token: those with the largest score plus bias, within the best groups.

    A group is worth the sum of its two best experts (arXiv 2412.19437, section 2.1.2, node-limited routing). The bias
    decides who is chosen, never with what weight.

    Args:
        scores_NE: sigmoid affinities.
        bias_E: selection bias.
        top_k: experts a token (K).
        n_group: groups that the experts are cut into, in order; 1: no groups.
        topk_group: groups that a token may use.

    Returns:
        [N, K] int64, in no particular order.
    """
    choice = scores_NE + bias_E
    if n_group > 1:
        groups_NGe = choice.view(len(choice), n_group, -1)
        value_NG = groups_NGe.topk(2, dim=-1).values.sum(-1)
        best = value_NG.topk(topk_group, dim=-1, sorted=False).indices
        shut_NG = torch.ones_like(value_NG, dtype=torch.bool).scatter_(1, best, False)
        choice = groups_NGe.masked_fill(shut_NG[..., None], float("-inf")).flatten(1)
    return choice.topk(top_k, dim=-1, sorted=False).indices


def gate_weights(scores_NE: Tensor, index_NK: Tensor, *, normalise: bool, scale: float) -> Tensor:
    """With what weight each chosen expert's output counts: its own score, as a share of the chosen ones' sum.

    Args:
        scores_NE: sigmoid affinities.
        index_NK: chosen experts.
        normalise: whether weights sum to 1 before the scale.
        scale: routed_scaling_factor.

    Returns:
        [N, K].
    """
    weights = scores_NE.gather(1, index_NK)
    if normalise:
        # All chosen scores can underflow to 0: without the epsilon that is 0/0.
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale


def count_loads(index_NK: Tensor, *, experts: int) -> Tensor:
    """Tokens routed to each expert, [E] int64, without waiting for a GPU (bincount would)."""
    flat = index_NK.flatten()
    return flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))


def update_bias(bias_E: Tensor, loads_E: Tensor, *, rate: float) -> Tensor:
    """Moves the selection bias against the load: up by ``rate`` for an expert below the mean, down above it.

    ``bias + rate * sign(mean load - load)`` (arXiv 2412.19437, section 2.1.2; auxiliary-loss-free balancing).

    Args:
        bias_E: fp32.
        loads_E: tokens that each expert got, over the whole global batch.
        rate: the bias update speed u.

    Returns:
        The new bias; unchanged where the load is the mean, hence everywhere when nothing was counted.
    """
    loads = loads_E.double()
    return bias_E + rate * torch.sign(loads.mean() - loads).to(bias_E.dtype)


def sequence_balance_loss(
    scores_BTE: Tensor, sequence_parallel: SequenceParallel | None = None, *, top_k: int, weight: float
) -> Tensor:
    """DeepSeek-V3's complementary balance loss of each sequence (arXiv 2412.19437, equations 17 to 20), averaged.

    ``weight * sum_e f_e P_e`` with ``f_e = E / (K T) * (tokens whose top K by score hold e)`` and ``P_e`` the mean
    over tokens of the score of e as a share of all scores. As in equation 18, the top K are those without the bias.

    Args:
        scores_BTE: sigmoid affinities.
        sequence_parallel: the processes that share out the sequences; the scores are then those of this one's part.
        top_k: experts a token (K).
        weight: alpha.

    Returns:
        A scalar; ``weight`` when all is balanced. Where sequences are shared out, the mean over their processes is that
        of whole sequences: f, which has no gradient, is of all of a sequence, and P of the part.
    """
    B, T, E = scores_BTE.shape
    chosen = scores_BTE.topk(top_k, dim=-1, sorted=False).indices.flatten(1)
    f_BE = scores_BTE.new_zeros(B, E).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores_BTE.dtype))
    if sequence_parallel is not None:
        f_BE, T = sequence_parallel.sum(f_BE), T * sequence_parallel.size
    P_BE = (scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)).mean(1)
    return weight * E / (top_k * T) * (f_BE * P_BE).sum(-1).mean()


class Router(Float32Buffers):
    """Chooses experts and counts how many tokens each one gets.

    Buffers: ``e_score_correction_bias`` [E] fp32, saved, moved by ``update_bias``; ``loads`` [E] int64, not saved:
    tokens that forward passes in training mode gave each (global) expert since it was last set to zero.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ("e_score_correction_bias",)
    e_score_correction_bias: Tensor
    loads: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.normalise, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        self.balance_loss_weight = config.balance_loss_weight
        self.weight = nn.Parameter(torch.empty(self.experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(self.experts, dtype=torch.float32))
        self.register_buffer("loads", torch.empty(self.experts, dtype=torch.int64), persistent=False)

    def choose(self, x_1D: Tensor) -> tuple[list[int], list[float]]:
        """Experts of a single token, and their weights."""
        scores_1E = F.linear(*_widened(x_1D, self.weight)).sigmoid()
        index_1K = select(
            scores_1E,
            self.e_score_correction_bias,
            top_k=self.top_k,
            n_group=self.n_group,
            topk_group=self.topk_group,
        )
        weights_1K = gate_weights(scores_1E, index_1K, normalise=self.normalise, scale=self.scale)
        return index_1K[0].tolist(), weights_1K[0].tolist()

    def forward(
        self, x_BTD: Tensor, sequence_parallel: SequenceParallel | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Routes tokens, in fp32 whatever the model's dtype.

        Args:
            x_BTD: tokens.
            sequence_parallel: the processes that share out the sequences, of which these tokens are a part.

        Returns:
            Chosen experts [N, K] int64, their weights [N, K] fp32, tokens an expert [E] int64, and the sequence-wise
            balance loss (None when its weight is 0).
        """
        logits_NE: Tensor = _WideLinear.apply(x_BTD.flatten(0, 1), self.weight)  # type: ignore[no-untyped-call]
        scores_NE = logits_NE.sigmoid()
        index_NK = select(
            scores_NE.detach(),
            self.e_score_correction_bias,
            top_k=self.top_k,
            n_group=self.n_group,
            topk_group=self.topk_group,
        )
        weights_NK = gate_weights(scores_NE, index_NK, normalise=self.normalise, scale=self.scale)
        loads_E = count_loads(index_NK, experts=self.experts)
        if counts(self):
            self.loads += loads_E
        balance = None
        if self.balance_loss_weight > 0:
            scores_BTE = scores_NE.view(*x_BTD.shape[:2], -1)
            balance = sequence_balance_loss(
                scores_BTE, sequence_parallel, top_k=self.top_k, weight=self.balance_loss_weight
            )
        return index_NK, weights_NK, loads_E, balance
