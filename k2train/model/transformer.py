"""The whole language model: DeepSeek-V3's architecture with Kimi K2's sizes (arXiv 2412.19437, 2507.20534), and the
plainer ones that it is compared with: grouped-query attention, dense layers alone.

Shapes: B batch, T tokens, D model, V vocabulary, R rope dims of a head.
Modules and parameters are named as in transformers' DeepseekV3ForCausalLM, without its leading ``model.``; only the
experts differ, which are stacked as ``mlp.experts.{w1,w3,w2}``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2train.config import ModelConfig, RopeScalingConfig
from k2train.model.attention import Attention, LatentAttention
from k2train.model.dispatch import ExpertParallel
from k2train.model.experts import Experts
from k2train.model.grouped_query import GroupedQueryAttention
from k2train.model.init import materialise
from k2train.model.loss import cross_entropy
from k2train.model.mlp import MLP
from k2train.model.moe import MoE
from k2train.model.norm import RMSNorm
from k2train.model.recompute import MODES, recomputed, recomputed_around_attention
from k2train.model.rope import rope_frequencies, rope_table, softmax_scale
from k2train.model.router import Router
from k2train.model.sequence import SequenceParallel

ATTENTION: dict[str, type[Attention]] = {"mla": LatentAttention, "gqa": GroupedQueryAttention}


class Block(nn.Module):
    """One layer: attention, then a dense or mixture-of-experts feed-forward, each on a normed residual stream.

    Attributes:
        checkpointing: see ``Transformer.checkpoint_activations``.
    """

    checkpointing = "none"

    def __init__(self, config: ModelConfig, mlp: MLP | MoE) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = ATTENTION[config.attention](config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = mlp

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        starts_BT: Tensor | None = None,
        sequence_parallel: SequenceParallel | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after this layer, and the layer's balance loss where it has one. See ``Attention``."""
        if self.checkpointing == "full":
            return recomputed(self._layer, x_BTD, cos, sin, starts_BT, sequence_parallel)
        return self._layer(x_BTD, cos, sin, starts_BT, sequence_parallel)

    def _layer(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        starts_BT: Tensor | None,
        sequence_parallel: SequenceParallel | None,
    ) -> tuple[Tensor, Tensor | None]:
        if self.checkpointing == "selective":
            mixed = recomputed_around_attention(self._attend, x_BTD, cos, sin, starts_BT, sequence_parallel)
        else:
            mixed = self._attend(x_BTD, cos, sin, starts_BT, sequence_parallel)
        x_BTD = x_BTD + mixed
        normed = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            out, balance = self.mlp(normed, sequence_parallel)
            return x_BTD + out, balance
        return x_BTD + self.mlp(normed), None

    def grow(
        self,
        x_BD: Tensor,
        turns: Tensor,
        memory_BSW: Tensor,
        place: tuple[Tensor | slice, Tensor | int],
        mask: Tensor | None,
    ) -> Tensor:
        """``forward`` for the newest token of each row. See ``Attention.recall``.

        Args:
            x_BD: the residual stream of the tokens.
            turns: of their positions.
            memory_BSW: of this layer; what is kept of the tokens is written into it.
            place: index of rows and positions in it.
            mask: true for what a row has not; None if each row has all.
        """
        normed = self.input_layernorm(x_BD)
        memory_BSW[place] = self.self_attn.remembered(normed[:, None], turns)[:, 0]
        x_BD = x_BD + self.self_attn.recall(normed, turns, memory_BSW, mask)
        normed = self.post_attention_layernorm(x_BD)
        if isinstance(self.mlp, MoE):
            alone = len(x_BD) == 1 and not x_BD.is_cuda
            out: Tensor = self.mlp.one_token(normed) if alone else self.mlp(normed[:, None])[0][:, 0]
        else:
            out = self.mlp(normed)
        return x_BD + out

    def _attend(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        starts_BT: Tensor | None,
        sequence_parallel: SequenceParallel | None,
    ) -> Tensor:
        out: Tensor = self.self_attn(self.input_layernorm(x_BTD), cos, sin, starts_BT, sequence_parallel)
        return out


class Transformer(nn.Module):
    """A decoder-only language model. ``build_model`` makes one with storage and initial values."""

    def __init__(
        self, config: ModelConfig, *, expert_parallel: ExpertParallel | None = None, moe_class: type[MoE] = MoE
    ) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError(
                "model.vocab_size=null: a model needs a number; take the tokenizer's padded size, "
                "as in dataclasses.replace(config, vocab_size=dataset.padded_vocab_size)"
            )
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(
                config,
                MLP(config.hidden_size, config.intermediate_size)
                if number < config.first_k_dense_replace
                else moe_class(config, expert_parallel=expert_parallel),
            )
            for number in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the head's own weight, or the embedding's when they are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        starts_BT: Tensor | None = None,
        sequence_parallel: SequenceParallel | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss of each token, or without labels the scores of the next.

        Args:
            tokens_BT: token ids int64.
            labels_BT: the ids to be predicted, or -100 where none is.
            starts_BT: int64, the index of the first token of each token's document, which alone it sees; positions
                begin there. None for one document a row.
            sequence_parallel: the processes that share out the sequences: tokens and labels are then this one's part,
                starts those of the whole; None: the sequences are whole.

        Returns:
            Cross-entropy [B, T] in nats (fp32, 0 where the label is -100), or scores [B, T, V] (fp32); and the
            sequence-wise balance loss: a scalar with its weight in it, summed over layers, 0 when it is off.

        Raises:
            ValueError: tokens are no [B, T] integers, more than max_position_embeddings, or labels of another shape.
        """
        if labels_BT is not None and labels_BT.shape != tokens_BT.shape:
            raise ValueError(
                f"labels of shape {tuple(labels_BT.shape)} for tokens of shape {tuple(tokens_BT.shape)}: "
                "give one label for each token, -100 where there is none"
            )
        x_BTD, balance = self._hidden(tokens_BT, starts_BT, sequence_parallel)
        if labels_BT is None:
            out = F.linear(x_BTD, self.head_weight).float()
        else:
            out = cross_entropy(x_BTD.flatten(0, 1), self.head_weight, labels_BT.flatten()).view(labels_BT.shape)
        return out, out.new_zeros(()) if balance is None else balance

    def logits(self, tokens_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Scores of the next token at each position, [B, T, V] fp32. Takes and raises what ``forward`` does."""
        scores: Tensor = self(tokens_BT, None, starts_BT)[0]  # as a call: ZeRO-3 gathers weights in modules' hooks
        return scores

    def _hidden(
        self, tokens_BT: Tensor, starts_BT: Tensor | None, sequence_parallel: SequenceParallel | None
    ) -> tuple[Tensor, Tensor | None]:
        if tokens_BT.ndim != 2 or tokens_BT.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens of shape {tuple(tokens_BT.shape)} and dtype {tokens_BT.dtype}: give token ids as "
                "[batch, tokens] integers (int64); a single sequence is tokens[None]"
            )
        T = tokens_BT.shape[1] * (1 if sequence_parallel is None else sequence_parallel.size)
        own = slice(0, T) if sequence_parallel is None else sequence_parallel.part(T)
        if self.config.max_position_embeddings < T:
            raise ValueError(
                f"a sequence of {T} tokens is longer than max_position_embeddings="
                f"{self.config.max_position_embeddings}: give a shorter one, or raise it in the model's config"
            )
        cos, sin = self.rope_tables(T, tokens_BT.device)
        if starts_BT is None:
            cos, sin = cos[own], sin[own]
        else:
            positions_B1T = (torch.arange(T, device=starts_BT.device) - starts_BT)[:, None, own]
            cos, sin = cos[positions_B1T], sin[positions_B1T]
        x_BTD, balance = self.embed_tokens(tokens_BT), None
        for layer in self.layers:
            x_BTD, part = layer(x_BTD, cos, sin, starts_BT, sequence_parallel)
            if part is not None:
                balance = part if balance is None else balance + part
        return self.norm(x_BTD), balance

    def rope_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the first ``length`` positions, [length, R/2] each."""
        scaling = self.config.rope_scaling
        frequencies = rope_frequencies(self.config.qk_rope_head_dim, theta=self.config.rope_theta, scaling=scaling)
        return rope_table(frequencies.to(device), length, scaling=scaling)

    def checkpoint_activations(self, mode: str) -> None:
        """What the backward pass makes again, from now on; no number changes.

        Args:
            mode: none; selective: what takes much memory and little work (see ``recompute``); full: all of a layer.

        Raises:
            ValueError: there is no such mode.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, but must be one of {', '.join(MODES)}")
        for module in self.modules():
            if isinstance(module, Block):
                module.checkpointing = mode
            elif isinstance(module, (Attention, MLP, Experts)):
                module.recompute = mode == "selective"

    def set_rope_scaling(self, scaling: RopeScalingConfig | None) -> None:
        """Changes how positions are extended, from the next forward pass on: rotation and the scale of the softmax.

        Args:
            scaling: YaRN, or None.
        """
        self.config = dataclasses.replace(self.config, rope_scaling=scaling)
        for _, layer in self.attention_layers():
            layer.scale = softmax_scale(layer.nope + layer.rope, scaling)

    def blocks(self) -> list[Block]:
        """The layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def attention_layers(self) -> list[tuple[str, Attention]]:
        """Every attention module with its global name: what QK-Clip watches and scales."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, Attention)]

    def moe_layers(self) -> list[tuple[str, MoE]]:
        """Every mixture-of-experts layer with its global name."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, MoE)]

    def parameter_roles(self) -> dict[str, str]:
        """The role of every parameter, by name: embedding, head, attention, mlp, expert, router or norm.

        ``mlp`` are dense layers and shared experts. A tied head is the embedding.
        """
        by_class = {nn.Embedding: "embedding", RMSNorm: "norm", Experts: "expert", Router: "router"}
        roles = {}
        for prefix, module in self.named_modules():
            for suffix, _ in module.named_parameters(recurse=False):
                if isinstance(module, nn.Linear):
                    role = "head" if prefix == "lm_head" else "attention" if ".self_attn." in prefix else "mlp"
                else:
                    role = by_class[type(module)]
                roles[f"{prefix}.{suffix}"] = role
        return roles


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients, and then as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: what ZeRO-3 gathers in it could not be trained with afterwards
            yield
    finally:
        model.train(was_training)


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    expert_parallel: ExpertParallel | None = None,
    moe_class: type[MoE] = MoE,
) -> Transformer:
    """A model with its initial values, the same on every rank, device and expert-parallel size (see ``init``).

    Args:
        config: architecture; vocab_size must be a number.
        seed: of the run.
        dtype: of the parameters; router biases and max logits are fp32 regardless.
        device: where it will live; ``meta`` gives shapes alone, in seconds for a trillion parameters, which
            ``materialise`` fills later.
        expert_parallel: the group that shares out the experts; None: all are here.
        moe_class: MoE or a subclass, constructed as ``moe_class(config, expert_parallel=...)``.

    Raises:
        ValueError: vocab_size is None, or the experts cannot be shared out evenly.
    """
    with torch.device("meta"):
        model = Transformer(config, expert_parallel=expert_parallel, moe_class=moe_class).to(dtype)
    if torch.device(device).type == "meta":
        return model
    first = 0 if expert_parallel is None else expert_parallel.first_expert(config.n_routed_experts)
    materialise(model, device=device, seed=seed, config=config, first_expert=first)
    return model
