"""MuonClip on a CUDA device: the numbers of a CPU, and a host that never waits."""

import math

import pytest
import torch
from muonclip import MuonClip, QKClip, newton_schulz

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
SHAPES = {"q": (64, 96), "tall": (160, 64), "experts": (4, 48, 32), "embedding": (50, 16), "norm": (33,)}
MUON = ("q", "tall", "experts")


class Attention:
    """Four heads of sixteen query rows."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.reset_max_logits()

    def reset_max_logits(self) -> None:
        self.max_logits = torch.full((4,), -math.inf, device=self.weight.device)

    def row_scales(self, gamma_H, *, alpha=0.5):
        yield self.weight, gamma_H.repeat_interleave(16)


def build(device: str, **settings) -> tuple[dict[str, torch.nn.Parameter], Attention, MuonClip]:
    generator = torch.Generator().manual_seed(0)
    params = {n: torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for n, s in SHAPES.items()}
    attention = Attention(params["q"])
    groups = [
        {"params": [(n, params[n]) for n in MUON], "algorithm": "muon"},
        {"params": [(n, params[n]) for n in SHAPES if n not in MUON], "algorithm": "adamw"},
    ]
    clip = QKClip([("attention", attention)], tau=1.0)
    return params, attention, MuonClip(groups, lr=0.02, qk_clip=clip, **settings)


def set_gradients(params: dict[str, torch.nn.Parameter], attention: Attention, *, step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)
    attention.max_logits = torch.tensor([0.5, 2.0 + step, -1.0, math.nan]).to(attention.weight.device)


def run(device: str, steps: int, **settings) -> tuple[dict[str, torch.Tensor], QKClip]:
    params, attention, optimizer = build(device, **settings)
    for step in range(steps):
        set_gradients(params, attention, step=step)
        optimizer.step()
    return {n: p.detach().cpu() for n, p in params.items()}, optimizer.qk_clip


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_give_the_weights_of_a_cpu(nesterov):
    (expected, clip), (found, clip_there) = (run(device, 3, nesterov=nesterov) for device in ("cpu", DEVICE))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=1e-4)
    for key in ("max_logits", "gamma", "cumulative", "invalid"):
        torch.testing.assert_close(getattr(clip_there, key).cpu(), getattr(clip, key))


@pytest.mark.parametrize("shape", [(64, 96), (160, 64), (4, 48, 32)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_newton_schulz_follows_its_polynomial(shape, dtype, tolerance):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = newton_schulz(matrices.double(), dtype=torch.float64)
    found = newton_schulz(matrices.to(DEVICE), dtype=dtype)
    assert found.dtype == dtype
    largest = torch.linalg.matrix_norm(found.double().cpu() - expected, ord=2).max()
    assert largest < tolerance


def test_neither_step_nor_gather_makes_the_host_wait():
    params, attention, optimizer = build(DEVICE, newton_schulz_dtype=torch.bfloat16)
    for step in range(2):  # allocations and compiled kernels of the first steps are no part of it
        set_gradients(params, attention, step=step)
        optimizer.step()
    set_gradients(params, attention, step=2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):  # so that the mode is known to work
            params["norm"].sum().item()
        optimizer.qk_clip.gather()
        optimizer.step()
        optimizer.qk_clip.reset()
        optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.qk_clip.gamma[0, 1].item() == pytest.approx(1 / 4)
