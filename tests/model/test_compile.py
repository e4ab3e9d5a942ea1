"""Compiled parts give the losses and gradients of eager ones, by few graphs, with activation checkpointing too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from k2train.model import Transformer, compile_parts

MakeModel = Callable[..., Transformer]
MakeTokens = Callable[..., Tensor]
GQA = {"attention": "gqa", "num_key_value_heads": 1, "q_lora_rank": None, "kv_lora_rank": None}


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compare(make_model: MakeModel, make_tokens: MakeTokens, *, backend: str, mode: str, **changes: object) -> None:
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = make_model(**changes), make_model(**changes)
    compiled.checkpoint_activations(mode)
    compile_parts(compiled, backend=backend)
    starts = torch.where(torch.arange(40) < 25, 0, 25).expand(2, -1)
    for number in range(2):
        tokens = make_tokens(2, 40, seed=number)
        losses = []
        for model in (eager, compiled):
            model.zero_grad()
            loss, _ = model(tokens, tokens, starts)
            loss.sum().backward()
            losses.append(loss.detach())
        assert (losses[0] - losses[1]).abs().max() <= 5e-6
        expected = dict(eager.named_parameters())
        for name, parameter in compiled.named_parameters():
            assert parameter.grad is not None
            wanted = expected[name].grad
            assert wanted is not None
            assert (parameter.grad - wanted).abs().max() <= 5e-6 * (1 + wanted.abs().max()), name
        # One for norms (3 layers have 6, and the last), one for projections, one each for dense and shared SwiGLU.
        assert graphs() == 4
    for (_, one), (_, other) in zip(eager.attention_layers(), compiled.attention_layers(), strict=True):
        torch.testing.assert_close(one.max_logits, other.max_logits)
    for (_, one), (_, other) in zip(eager.moe_layers(), compiled.moe_layers(), strict=True):
        assert torch.equal(one.gate.loads, other.gate.loads)
    with torch.no_grad():
        for length in range(1, 12):  # as when text is sampled
            torch.testing.assert_close(compiled.logits(tokens[:, :length]), eager.logits(tokens[:, :length]))
    assert graphs() == 4
    assert compiled.state_dict().keys() == eager.state_dict().keys()


def test_traced_parts_agree_with_eager(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    """All of torch.compile but the code generator, with what is hardest for it."""
    compare(make_model, make_tokens, backend="aot_eager", mode="selective")


@pytest.mark.full
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("changes", [{}, GQA], ids=["mla", "gqa"])
def test_compiled_parts_agree_with_eager(
    make_model: MakeModel, make_tokens: MakeTokens, mode: str, changes: dict[str, object]
) -> None:
    compare(make_model, make_tokens, backend="inductor", mode=mode, **changes)
