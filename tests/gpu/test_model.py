"""The model on a CUDA device against itself on a CPU in fp32."""

import copy
import math

import pytest
import torch

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import RunConfig, parse
from k2train.model import build_model, experts
from k2train.model.recompute import MODES

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


def build(name="nano"):
    words = [f"model={name}", "model.vocab_size=64", "model.initializer_range=0.1"]
    config = parse(RunConfig, compose(TRAIN, words))
    return build_model(config.model, seed=0, device="cpu")


def forward_backward(model, tokens, starts=None):
    loss_BT, balance = model(tokens, tokens.roll(-1, 1), starts)
    (loss_BT.mean() + balance).backward()
    maxima = torch.stack([layer.max_logits for _, layer in model.attention_layers()])
    return loss_BT.detach().float().cpu(), maxima.cpu(), {n: p.grad.float().cpu() for n, p in model.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", ["nano", "small-gqa"])
def test_fp32_gives_the_loss_and_gradients_of_a_cpu_and_bounds_its_maxima(name, documents, mode):
    model, tokens = build(name), torch.randint(64, (2, 200), generator=torch.Generator().manual_seed(0))
    starts = torch.where(torch.arange(200) < 70, 0, 70).repeat(2, 1) if documents else None
    on_gpu = copy.deepcopy(model).to(DEVICE)
    on_gpu.checkpoint_activations(mode)
    found_starts = None if starts is None else starts.to(DEVICE)
    loss, maxima, grads = forward_backward(on_gpu, tokens.to(DEVICE), found_starts)
    expected_loss, expected_maxima, expected = forward_backward(model, tokens, starts)
    torch.testing.assert_close(loss, expected_loss, atol=1e-4, rtol=1e-4)
    # Where a kernel's log-sum-exp does not tell the largest of 200 logits it bounds it, by log(200) at most.
    assert (maxima >= expected_maxima - 1e-3).all()
    assert (maxima <= expected_maxima + math.log(200) + 1e-3).all()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-4, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("mode", MODES)
def test_bf16_is_near(mode):
    """Single tokens may go to other experts, so that only the mean is held."""
    model, tokens = build(), torch.randint(64, (2, 200), generator=torch.Generator().manual_seed(0))
    on_gpu = copy.deepcopy(model).to(DEVICE, torch.bfloat16)
    on_gpu.checkpoint_activations(mode)
    loss, _, grads = forward_backward(on_gpu, tokens.to(DEVICE))
    expected_loss, _, _ = forward_backward(model, tokens)
    assert loss.mean() == pytest.approx(float(expected_loss.mean()), abs=0.05)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("experts_of_all", [(0, 2, 3), (2,), (0, 1, 2, 3)])
def test_experts_by_grouped_products(monkeypatch, experts_of_all):
    """Row counts that are no multiple of anything, and experts without a row, whose gradients are zeros."""
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor(experts_of_all)[torch.randint(len(experts_of_all), (33, 1), generator=generator)]
    loads = torch.bincount(index.flatten(), minlength=4)
    shapes = ((33, 64), (4, 48, 64), (4, 48, 64), (4, 64, 48))  # x, w1, w3, w2
    values = [(0.2 * torch.randn(shape, generator=generator)).bfloat16() for shape in shapes]
    scores = torch.rand(33, 1, generator=generator)
    taken, grouped = [], experts._grouped
    monkeypatch.setattr(experts, "_grouped", lambda *args, **kwargs: taken.append(True) or grouped(*args, **kwargs))

    def run(device: str, dtype: torch.dtype):
        x, *weights = inputs = [v.detach().to(device, dtype).requires_grad_() for v in values]
        own_scores = scores.to(device, copy=True).requires_grad_()
        out = experts.routed_experts(x, index.to(device), own_scores, *weights, loads.to(device))
        out.float().square().sum().backward()
        return [out.detach().float().cpu(), *(x.grad.float().cpu() for x in (own_scores, *inputs))]

    found = run(DEVICE, torch.bfloat16)
    assert taken
    for value, expected in zip(found, run("cpu", torch.float32), strict=True):
        torch.testing.assert_close(value, expected, atol=0.02 * float(expected.abs().max()), rtol=0.05)
    for grad in found[3:]:
        assert not grad[loads == 0].any()
