"""Attention modules that QK-Clip can clip, and K2's: multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434,
section 2.1).

Shapes: B batch, T tokens, D model, H heads, d dims of a query or key head, of which N without position (nope) and R
with (rope), V dims of a value head, q and kv latents of q_lora_rank and kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from k2train.config import ModelConfig
from k2train.model.causal import attention, choose_backend
from k2train.model.float32 import Float32Buffers, counts
from k2train.model.norm import RMSNorm
from k2train.model.rope import heads, rotate, softmax_scale
from k2train.model.sequence import SequenceParallel

# DeepSeek-V3 and Kimi K2 norm their latents with this, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6
# Far below K2's tau of 100, and of the tau of 30 that small models are clipped at.
HEALTHY = 20.0


class Attention(Float32Buffers):
    """What all kinds share: causal attention, and QK-Clip's view of it. A kind makes q, k and v, and has o_proj.

    Follows QK-Clip's protocol: ``max_logits`` [H] fp32 is the largest logit of each head over the forward passes in
    training mode since ``reset_max_logits`` (-inf when there was none, NaN when a logit was NaN), and ``row_scales``
    says which rows of which weights the clip multiplies. ``max_logit_fallbacks`` counts the heads of those passes whose
    maximum the attention kernel's log-sum-exp did not tell (see ``causal.attention``): more than a few cost time on a
    CPU, and on a GPU clip by too much. ``found_logits`` [H] fp32 are the largest logits that were seen themselves:
    where they are less than ``max_logits``, those are upper bounds.

    Attributes:
        exact_above: a head whose logits provably do not exceed this may report that bound instead of its maximum. No
            more than QK-Clip's tau. (Kernels that see their logits, such as the one for CPUs, are always exact.)
        recompute: whether the backward pass makes probabilities again that it could have kept.
    """

    recompute = False

    float32_buffers: ClassVar[tuple[str, ...]] = ("max_logits", "found_logits")
    max_logits: Tensor
    found_logits: Tensor
    max_logit_fallbacks: Tensor
    o_proj: nn.Linear  # [D, H * V]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.value = config.num_attention_heads, config.v_head_dim
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.scale = softmax_scale(self.nope + self.rope, config.rope_scaling)
        self.exact_above = HEALTHY
        for name in self.float32_buffers:
            self.register_buffer(name, torch.empty(self.heads, dtype=torch.float32), persistent=False)
        self.register_buffer("max_logit_fallbacks", torch.empty((), dtype=torch.int64), persistent=False)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        starts_BT: Tensor | None = None,
        sequence_parallel: SequenceParallel | None = None,
    ) -> Tensor:
        """Mixes tokens.

        Args:
            x_BTD: normed input.
            cos: [T, R/2] of ``rope_table``, or [B, 1, T, R/2] where positions differ between rows.
            sin: likewise.
            starts_BT: int64, the position of the first token of each token's document; None for one document a row.
            sequence_parallel: the processes that share out the sequences; all but ``starts_BT`` is then of its part.

        Returns:
            [B, T, D].
        """
        B, T, _ = x_BTD.shape
        q, k, v = self.project(x_BTD, cos, sin)
        if sequence_parallel is not None:
            q, k, v = sequence_parallel.to_heads(q, k, v)
        out_BHTV, maxima = attention(
            q,
            k,
            v,
            starts_BT,
            scale=self.scale,
            with_max=counts(self),
            exact_above=self.exact_above,
            keep=not self.recompute,
        )
        if sequence_parallel is not None:
            out_BHTV = sequence_parallel.to_sequence(out_BHTV)
        if maxima is not None:
            largest, found = maxima.largest, maxima.found
            if sequence_parallel is not None:
                largest, found = (sequence_parallel.among_heads(x, others=float("-inf")) for x in (largest, found))
            self.max_logits = torch.maximum(self.max_logits, largest)
            self.found_logits = torch.maximum(self.found_logits, found)
            self.max_logit_fallbacks = self.max_logit_fallbacks + maxima.fallbacks
        out: Tensor = self.o_proj(out_BHTV.transpose(1, 2).reshape(B, T, -1))
        return out

    def project(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, T, d], rotated keys [B, H, T, d] and values [B, H, T, V]."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Numbers that are kept of a token to attend to it later (W)."""
        raise NotImplementedError

    def remembered(self, x_BTD: Tensor, turns: Tensor) -> Tensor:
        """What is kept of tokens, [B, T, W].

        Args:
            x_BTD: normed input.
            turns: [T, R/2] or [B, T, R/2], complex: cosine and sine of the tokens' positions.
        """
        raise NotImplementedError

    def recall(self, x_BD: Tensor, turns: Tensor, memory_BSW: Tensor, hidden_BS: Tensor | None) -> Tensor:
        """``forward`` for the newest token of each row, over what is kept of the row.

        Args:
            x_BD: normed input.
            turns: [B, 1, R/2] of the tokens' positions, or [1, 1, R/2] if they are the same.
            memory_BSW: what ``remembered`` gave for the tokens of each row, the newest among them.
            hidden_BS: true for those that a row has not; None if each row has all.

        Returns:
            [B, D].
        """
        raise NotImplementedError

    def row_scales(self, gamma_H: Tensor, *, alpha: float = 0.5) -> Iterator[tuple[Tensor, Tensor]]:
        """What multiplies each row of a weight so that head h's logits shrink by gamma_h (arXiv 2507.20534, 2.1).

        Where a head's query and key belong to it alone they share gamma: as its square roots in K2. Where heads share a
        key, scaling it would move the others' logits too, and the query takes all of gamma. A gamma of 1 gives scales
        of exactly 1.

        Args:
            gamma_H: [H], positive.
            alpha: the query's share, as an exponent of gamma.

        Returns:
            (weight, [rows]) for each weight that is scaled.
        """
        raise NotImplementedError

    def backend(self, length: int) -> str:
        """The name of the attention kernel (``causal.BACKENDS``) that sequences of this many tokens take here."""
        weight = self.o_proj.weight  # of the device and dtype that attention runs in
        q = weight.new_empty(1, self.heads, length, self.nope + self.rope)
        v = weight.new_empty(1, self.heads, length, self.value)
        return choose_backend(q, q, v, None, scale=self.scale)

    def reset_max_logits(self) -> None:
        """Forgets the maxima: the next forward pass in training mode starts a new step."""
        self.max_logits = torch.full_like(self.max_logits, float("-inf"))
        self.found_logits = torch.full_like(self.found_logits, float("-inf"))
        self.max_logit_fallbacks = torch.zeros_like(self.max_logit_fallbacks)


def weigh(q: Tensor, k: Tensor, hidden_BS: Tensor | None, *, scale: float) -> Tensor:
    """Attention weights of single queries [B, ..., n, d] over keys [B, ..., S, d]: [B, ..., n, S], 0 where hidden."""
    logits = torch.matmul(q * scale, k.transpose(-1, -2))
    if hidden_BS is not None:
        shape = (len(hidden_BS), *[1] * (logits.ndim - 2), hidden_BS.shape[1])
        logits = logits.masked_fill(hidden_BS.view(shape), float("-inf"))
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)


class LatentAttention(Attention):
    """MLA as it is trained: keys and values of all heads are made from one latent a token, plus one shared rope key."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.kv_lora_rank is not None  # ModelConfig.check
        D, H = config.hidden_size, config.num_attention_heads
        self.kv_latent = config.kv_lora_rank
        q_width = H * (self.nope + self.rope)
        self.q_compressed = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, self.kv_latent + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_latent, eps=LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.kv_latent, H * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(H * self.value, D, bias=False)

    def project(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Attention``; keys are [nope | rope] and the rope part is the same for all heads."""
        B, T, _ = x_BTD.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD))) if self.q_compressed else self.q_proj(x_BTD)
        latent, rope_key = self.kv_a_proj_with_mqa(x_BTD).split((self.kv_latent, self.rope), dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        return heads(q.view(B, T, self.heads, -1), kv.view(B, T, self.heads, -1), rope_key, cos, sin)

    @property
    def width(self) -> int:
        """See ``Attention``: the latent and the rope key that all heads share."""
        return self.kv_latent + self.rope

    def remembered(self, x_BTD: Tensor, turns: Tensor) -> Tensor:
        """See ``Attention``."""
        latent, rope_key = self.kv_a_proj_with_mqa(x_BTD).split((self.kv_latent, self.rope), dim=-1)
        return torch.cat((self.kv_a_layernorm(latent), rotate(rope_key, turns)), dim=-1)

    def recall(self, x_BD: Tensor, turns: Tensor, memory_BSW: Tensor, hidden_BS: Tensor | None) -> Tensor:
        """See ``Attention``. Neither keys nor values are made: their projections are absorbed into query and output.

        With ``k_nope = W_uk c`` and ``v = W_uv c`` of a latent c, ``q . k_nope = (W_uk^T q) . c``, and the weighted sum
        of values is ``W_uv`` times that of latents (arXiv 2405.04434, section 2.1.2).
        """
        B = len(x_BD)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BD))) if self.q_compressed else self.q_proj(x_BD)
        q = q.view(B, self.heads, -1)
        nope_BHN, rope_BHR = q[..., : self.nope], q[..., self.nope :]
        up = self.kv_b_proj.weight.view(self.heads, -1, self.kv_latent)
        key_HNC, value_HVC = up[:, : self.nope], up[:, self.nope :]
        absorbed_BHC = torch.bmm(nope_BHN.transpose(0, 1), key_HNC).transpose(0, 1)
        q_BHW = torch.cat((absorbed_BHC, rotate(rope_BHR, turns)), dim=-1)
        mixed_BHC = weigh(q_BHW, memory_BSW, hidden_BS, scale=self.scale) @ memory_BSW[..., : self.kv_latent]
        out_HBV = torch.bmm(mixed_BHC.transpose(0, 1), value_HVC.transpose(1, 2))
        out: Tensor = self.o_proj(out_HBV.transpose(0, 1).reshape(B, -1))
        return out

    def row_scales(self, gamma_H: Tensor, *, alpha: float = 0.5) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``Attention``: the nope parts share gamma; the rope part of the query, whose key is shared, takes all."""
        query_scale = (gamma_H**alpha)[:, None].expand(-1, self.nope)
        key_scale = (gamma_H ** (1 - alpha))[:, None].expand(-1, self.nope)
        rope_scale = gamma_H[:, None].expand(-1, self.rope)
        value_scale = torch.ones_like(gamma_H)[:, None].expand(-1, self.value)
        query = self.q_b_proj if self.q_compressed else self.q_proj
        yield query.weight, torch.cat((query_scale, rope_scale), 1).flatten()
        yield self.kv_b_proj.weight, torch.cat((key_scale, value_scale), 1).flatten()
