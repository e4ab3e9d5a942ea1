"""Mixture-of-experts layer (DeepSeekMoE, arXiv 2412.19437, section 2.1.2): router, dispatch, experts, shared experts.

Shapes: B batch, T tokens, D model.
"""

from __future__ import annotations

from torch import Tensor, nn

from k2train.config import ModelConfig
from k2train.model.dispatch import AllToAllDispatch, Dispatch, ExpertParallel, LocalDispatch
from k2train.model.experts import Experts
from k2train.model.mlp import MLP
from k2train.model.router import Router
from k2train.model.sequence import SequenceParallel


class MoE(nn.Module):
    """Each token through its top-k experts and through the shared ones, none dropped.

    A subclass may also derive from another layer class (DeepSpeed knows its expert layers by class); hence
    ``nn.Module.__init__`` is called by name and not through ``super()``.
    """

    def __init__(self, config: ModelConfig, *, expert_parallel: ExpertParallel | None = None) -> None:
        nn.Module.__init__(self)
        size = 1 if expert_parallel is None else expert_parallel.size
        if config.n_routed_experts % size:
            raise ValueError(
                f"n_routed_experts={config.n_routed_experts} cannot be shared out over {size} processes: "
                "the expert-parallel size must divide it"
            )
        self.gate = Router(config)
        self.experts = Experts(config.n_routed_experts // size, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = (
            MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
            if config.n_shared_experts
            else None
        )
        self.dispatch: Dispatch = LocalDispatch() if expert_parallel is None else AllToAllDispatch(expert_parallel)

    def forward(self, x_BTD: Tensor, sequence_parallel: SequenceParallel | None = None) -> tuple[Tensor, Tensor | None]:
        """The layer's output [B, T, D] and its sequence-wise balance loss (None when that is off). See ``Router``."""
        index_NK, weights_NK, loads_E, balance = self.gate(x_BTD, sequence_parallel)
        out_ND = self.dispatch(self.experts, self.shared_experts, x_BTD.flatten(0, 1), index_NK, weights_NK, loads_E)
        return out_ND.view_as(x_BTD), balance

    def one_token(self, x_1D: Tensor) -> Tensor:
        """``forward`` of a single token, [1, D], without gradient: nothing is sorted or counted."""
        index_K, weights_K = self.gate.choose(x_1D)
        out_1D = self.experts.one_token(x_1D, index_K, weights_K)
        return out_1D if self.shared_experts is None else out_1D + self.shared_experts(x_1D)
