"""Kimi K2's model in plain torch: latent attention, mixture of experts, chunked loss, at any size.

``build_model`` makes one from a ``ModelConfig``. Nothing here knows an optimizer or DeepSpeed: what they need is
exposed by ``attention_layers``, ``moe_layers`` and ``parameter_roles``.
"""

from k2train.model.attention import Attention, LatentAttention
from k2train.model.causal import attention
from k2train.model.compile import compile_parts
from k2train.model.dispatch import ExpertParallel
from k2train.model.grouped_query import GroupedQueryAttention
from k2train.model.incremental import Incremental
from k2train.model.init import materialise
from k2train.model.loss import document_losses
from k2train.model.moe import MoE
from k2train.model.router import Router, update_bias
from k2train.model.sequence import SequenceParallel
from k2train.model.transformer import Transformer, build_model, evaluating

__all__ = [
    "Attention",
    "ExpertParallel",
    "GroupedQueryAttention",
    "Incremental",
    "LatentAttention",
    "MoE",
    "Router",
    "SequenceParallel",
    "Transformer",
    "attention",
    "build_model",
    "compile_parts",
    "document_losses",
    "evaluating",
    "materialise",
    "update_bias",
]
