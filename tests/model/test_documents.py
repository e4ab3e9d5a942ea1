"""Documents packed into one row are what each of them is alone: losses, gradients and largest logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from k2train.model import Transformer, document_losses

MakeModel = Callable[..., Transformer]
MakeTokens = Callable[..., Tensor]
KINDS = {
    "mla": {},
    "gqa": {"attention": "gqa", "num_key_value_heads": 1, "q_lora_rank": None, "kv_lora_rank": None},
}
# Two rows: the longer documents fill more than one block of 128 rows, and some are of a single token.
LENGTHS = ((1, 7, 130, 1, 20, 1), (60, 100))
LENGTH = 160


def starts() -> Tensor:
    rows = []
    for lengths in LENGTHS:
        ends = torch.tensor(lengths).cumsum(0)
        rows.append((ends - torch.tensor(lengths)).repeat_interleave(torch.tensor(lengths)))
    return torch.stack(rows)


def documents() -> list[tuple[int, slice]]:
    """(row, tokens) of each."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            found.append((row, slice(start, start + length)))
            start += length
    return found


@pytest.mark.parametrize("backend", ["block", "flash_cpu", "math"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_document_is_the_document_alone(
    make_model: MakeModel, make_tokens: MakeTokens, kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k2train.model.causal.choose_backend", lambda *_, **__: backend)
    tokens, labels = make_tokens(2, LENGTH), make_tokens(2, LENGTH, seed=1)
    together, apart = make_model(**KINDS[kind]), make_model(**KINDS[kind])
    for model in (together, apart):
        for _, layer in model.attention_layers():
            layer.exact_above = float("-inf")
    loss, _ = together(tokens, labels, starts())
    loss.sum().backward()
    expected = torch.empty_like(loss)
    for row, part in documents():
        alone, _ = apart(tokens[row : row + 1, part], labels[row : row + 1, part])
        alone.sum().backward()
        expected[row, part] = alone[0].detach()

    assert (loss - expected).abs().max() <= 5e-6
    gradients = dict(apart.named_parameters())
    for name, parameter in together.named_parameters():
        assert parameter.grad is not None
        wanted = gradients[name].grad
        assert wanted is not None
        assert (parameter.grad - wanted).abs().max() <= 5e-6 * (1 + wanted.abs().max()), name
    for (_, one), (_, other) in zip(together.attention_layers(), apart.attention_layers(), strict=True):
        torch.testing.assert_close(one.max_logits, other.max_logits, atol=1e-5, rtol=1e-5)
    for (_, one), (_, other) in zip(together.moe_layers(), apart.moe_layers(), strict=True):
        assert torch.equal(one.gate.loads, other.gate.loads)

    with torch.no_grad():
        mixed, _ = together(tokens, labels)
        of_label = together.logits(tokens, starts()).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    assert (mixed - loss).abs().max() > 0.1  # without starts the later documents see what is before them
    torch.testing.assert_close(-of_label, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_document_a_row_is_no_documents_to_the_last_bit(
    make_model: MakeModel, make_tokens: MakeTokens, kind: str
) -> None:
    tokens, labels = make_tokens(2, LENGTH), make_tokens(2, LENGTH, seed=1)
    results = []
    for given in (None, torch.zeros(2, LENGTH, dtype=torch.int64)):
        model = make_model(**KINDS[kind])
        loss, _ = model(tokens, labels, given)
        loss.sum().backward()
        results.append((loss, *(p.grad for p in model.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_loss_of_each_document(make_tokens: MakeTokens) -> None:
    labels = make_tokens(2, LENGTH, seed=1)
    labels[labels < 10] = -100
    labels[0, 0] = -100  # a document without anything to predict
    loss = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)).masked_fill(labels < 0, 0.0)
    expected_nats, expected_counts = torch.zeros(2, LENGTH), torch.zeros(2, LENGTH, dtype=torch.int64)
    for row, part in documents():
        for position in range(part.start, part.stop):
            if labels[row, position] >= 0:
                expected_nats[row, part.start] += loss[row, position]
                expected_counts[row, part.start] += 1
    nats, counts = document_losses(loss, labels, starts())
    torch.testing.assert_close(nats, expected_nats)
    assert torch.equal(counts, expected_counts)
    assert counts[0, 0] == 0
