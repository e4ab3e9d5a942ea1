"""Operations of a model by torch's counter."""

from __future__ import annotations

import math
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from k2train.config import ModelConfig
from k2train.model import build_model, causal

Shape = tuple[int, ...]


def counted_operations(config: ModelConfig, *, batch: int, length: int) -> float:
    """Of a token, forward and backward.

    Attention is the plain one, whose products the counter sees and which do not leave out what is hidden. It is told of
    products that are added to what is there. In eval mode, where nobody asks for the largest logits.
    """
    model = build_model(config, seed=0).eval()
    assert config.vocab_size is not None
    tokens = torch.randint(config.vocab_size, (batch, length))
    with (
        mock.patch.object(causal, "choose_backend", return_value="math"),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _added_product}) as counter,
    ):
        loss, balance = model(tokens, tokens.roll(-1, 1))
        (loss.mean() + balance).backward()
    return float(counter.get_total_flops()) / (batch * length)


def _added_product(_: Shape, left: Shape, right: Shape, **__: object) -> int:
    return 2 * math.prod(left) * right[-1]
