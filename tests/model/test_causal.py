"""Attention and its max logits against plain float64, for every back end that this machine has."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from k2train.model import block_attention, causal, kernels
from k2train.model.causal import BACKENDS, attention, choose_backend

ON_CPU = ("block", "flash_cpu", "math")
Gradients = tuple[torch.Tensor, ...]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def documents(batch: int, length: int, seed: int) -> torch.Tensor:
    """Random starts [B, T]: about one document in eight tokens begins anew."""
    begins = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 1 / 8
    return torch.where(begins, torch.arange(length), 0).cummax(1).values


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, starts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """Output, maxima and the gradients of sum(out^2), in float64."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    i = torch.arange(q.shape[2])
    first = torch.zeros(1, len(i), dtype=torch.int64) if starts is None else starts
    visible = (i <= i[:, None]) & (i >= first[:, :, None])
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible[:, None], -math.inf)
    out = logits.softmax(-1) @ v
    return out, logits.amax((0, 2, 3)), torch.autograd.grad(out.square().sum(), (q, k, v))


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    *,
    scale: float,
    backend: str | None,
    atol: float = 2e-5,
    rtol: float = 1e-4,
) -> None:
    """Output, maxima and gradients of ``attention`` on its device are those of float64."""
    expected, maxima, gradients = plain(*(t.cpu() for t in (q, k, v)), scale, None if starts is None else starts.cpu())
    out, found = attention(q, k, v, starts, scale=scale, with_max=True, backend=backend)
    torch.testing.assert_close(out.double().cpu(), expected, atol=atol, rtol=rtol)
    assert found.largest.dtype == torch.float32
    assert not found.largest.requires_grad
    torch.testing.assert_close(found.largest.double().cpu(), maxima, atol=1e-6, rtol=1e-5)
    for got, wanted in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients, strict=True):
        torch.testing.assert_close(got.double().cpu(), wanted, atol=2 * atol, rtol=rtol)
    assert attention(q, k, v, starts, scale=scale, with_max=False, backend=backend)[1] is None


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_fp32(backend: str, length: int, packed: bool) -> None:
    q, k, v = (random(2, 3, length, size, seed=seed) for seed, size in enumerate((10, 10, 7)))
    check(q, k, v, documents(2, length, 0) if packed else None, scale=0.7, backend=backend)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("group", [1, 2, 6])
def test_blocks(packed: bool, keep: bool, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one sequence, of some that do not divide n, and of all; probabilities kept or made again."""
    monkeypatch.setattr(block_attention, "KEPT_PROBABILITIES", 2**24 if keep else 0)
    monkeypatch.setattr(block_attention, "BLOCK", group * 128 * 300)
    q, k, v = (random(1, 5, 300, size, seed=seed) for seed, size in enumerate((6, 6, 9)))
    check(q, k, v, documents(1, 300, 1) if packed else None, scale=0.7, backend="block")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    backend=st.sampled_from(ON_CPU),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 150),
    width=st.integers(1, 9),
    value=st.integers(1, 9),
    packed=st.booleans(),
)
def test_any_shape(
    seed: int, backend: str, batch: int, heads: int, length: int, width: int, value: int, packed: bool
) -> None:
    sizes = (width, width, value)
    q, k, v = (random(batch, heads, length, size, seed=seed + i) for i, size in enumerate(sizes))
    check(q, k, v, documents(batch, length, seed) if packed else None, scale=0.5, backend=backend)


def test_float64() -> None:
    q, k, v = (random(1, 2, 150, 6, seed=seed, dtype=torch.float64) for seed in range(3))
    expected, _, gradients = plain(q, k, v, 0.5)
    out, _ = attention(q, k, v, scale=0.5, with_max=True)
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=1e-12)
    for got, wanted in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
def test_bf16_maxima_are_those_of_fp32_logits(backend: str) -> None:
    q, k, v = (random(2, 3, 60, 24, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    with torch.no_grad():
        q[:, 1] *= 8  # logits above 100, where bf16 is off by 0.5
    expected, maxima, gradients = plain(q, k, v, 0.5)
    assert maxima[1] > 50
    out, (largest, *_) = attention(q, k, v, scale=0.5, with_max=True, backend=backend)
    torch.testing.assert_close(largest.double(), maxima, atol=0, rtol=1e-6)
    assert largest.dtype == torch.float32
    if backend != "math":  # whose softmax is off like its logits
        assert (out.double() - expected).abs().max() < 0.02
        for got, wanted in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients, strict=True):
            assert got.dtype == torch.bfloat16
            assert (got.double() - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("backend", ON_CPU)
def test_other_documents_and_later_keys_are_not_read(backend: str) -> None:
    """Whatever they hold, infinities included, changes neither output nor maximum of the second document."""
    q, k, v = (random(1, 2, 200, 4, seed=seed).detach() for seed in range(3))
    starts = torch.where(torch.arange(200) < 140, 0, 140)[None]
    alone, (largest, *_) = attention(*(t[:, :, 140:] for t in (q, k, v)), scale=1.0, with_max=True, backend=backend)
    k[:, :, 3] = 1e4
    out, _ = attention(q, k, v, starts, scale=1.0, with_max=True, backend=backend)
    torch.testing.assert_close(out[:, :, 140:], alone, atol=1e-6, rtol=1e-5)
    q[:, :, :140] = 0.0
    _, maxima = attention(q, k, v, starts, scale=1.0, with_max=True, backend=backend)
    torch.testing.assert_close(maxima.largest, largest.clamp(min=0), atol=0, rtol=1e-6)


@pytest.mark.parametrize("backend", ["block", "math"])
def test_hidden_infinity_makes_no_nan(backend: str) -> None:
    q, k, v = (random(1, 1, 6, 2, seed=seed).detach() for seed in range(3))
    k[0, 0, 4] = math.inf
    out, _ = attention(q, k, v, scale=1.0, with_max=False, backend=backend)
    assert out[:, :, :4].isfinite().all()


def test_flat_heads_fall_back_or_report_a_bound() -> None:
    """From a log-sum-exp: exact and counted above ``exact_above``, else a bound that does not exceed it."""
    q, k, v = (random(1, 3, 200, 4, seed=seed).detach() * 0.01 for seed in range(3))
    q[:, 2] *= 1e5
    k[:, 2] *= 10
    _, maxima, _ = plain(q, k, v, 1.0)
    _, (largest, fallbacks, found) = attention(q, k, v, scale=1.0, with_max=True, backend="flash_cpu")
    assert torch.equal(found, largest)
    torch.testing.assert_close(largest.double(), maxima, atol=1e-7, rtol=1e-5)
    assert fallbacks.item() == 2
    _, (largest, fallbacks, found) = attention(q, k, v, scale=1.0, with_max=True, backend="flash_cpu", exact_above=20.0)
    assert fallbacks.item() == 0
    assert (found < largest).tolist() == [True, True, False]
    assert (largest[:2] - math.log(200)).abs().max() < 0.1
    torch.testing.assert_close(largest[2].double(), maxima[2], atol=0, rtol=1e-5)
    for backend in ("block", "math"):
        assert attention(q, k, v, scale=1.0, with_max=True, backend=backend)[1].fallbacks.item() == 0


def test_what_is_refused() -> None:
    q = random(1, 2, 8, 4, seed=0)
    with pytest.raises(ValueError, match=r"starts is \[1, 7\] of torch\.int64, but must be \[1, 8\]"):
        attention(q, q, q, torch.zeros(1, 7, dtype=torch.int64), scale=1.0, with_max=False)
    with pytest.raises(ValueError, match="int32"):
        attention(q, q, q, torch.zeros(1, 8, dtype=torch.int32), scale=1.0, with_max=False)
    with pytest.raises(ValueError, match="backend is 'fast', but must be one of block, flash_cpu"):
        attention(q, q, q, scale=1.0, with_max=False, backend="fast")
    with pytest.raises(ValueError, match="takes no documents"):
        attention(q, q, q, torch.zeros(1, 8, dtype=torch.int64), scale=1.0, with_max=False, backend="flash")


# CUDA kernels without CUDA: shapes and operators by torch's meta implementations, then the same checks where there is
# a card.


@pytest.mark.parametrize(
    ("name", "node"), [("flash", "Flash"), ("efficient", "Efficient"), ("cudnn", "Cudnn"), ("flash_cpu", "FlashForCpu")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_operators_and_shapes(name: str, node: str, packed: bool) -> None:
    """Each kernel gives out [B, H, T, V] and lse [B, H, T] in fp32, and is differentiable by torch's own formula."""
    if name == "flash" and packed:
        return  # refused, see above
    device = "cpu" if name == "flash_cpu" else "meta"
    q, k = (torch.empty(2, 3, 40, 48, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(2))
    v = torch.empty(2, 3, 40, 32, dtype=torch.bfloat16, device=device, requires_grad=True)
    starts = torch.zeros(2, 40, dtype=torch.int64, device=device) if packed else None
    out, lse = causal.LSE_KERNELS[name](q, k, v, starts, scale=0.1)
    assert out.shape == (2, 3, 40, 32)
    assert lse.shape == (2, 3, 40)
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    nodes, names = [out.grad_fn], set()
    while nodes:
        current = nodes.pop()
        if current is not None:
            names.add(current.name())
            nodes.extend(parent for parent, _ in current.next_functions)
    backward = "ScaledDotProductFlashAttentionForCpuBackward0" if name == "flash_cpu" else None
    assert (backward or f"ScaledDotProduct{node}AttentionBackward0") in names


def test_rows_of_a_bias_are_aligned() -> None:
    """The memory-efficient and the cuDNN kernel want strides that are multiples of 8, and of 16 in older versions."""
    q = torch.zeros(2, 3, 9, 4)
    bias = kernels.document_bias(q, documents(2, 9, 0), hidden=-7.0, align=16)
    assert bias.shape == (2, 1, 9, 9)
    assert bias.stride()[-2:] == (16, 1)
    assert set(bias.unique().tolist()) == {-7.0, 0.0}


def test_choice() -> None:
    """On a CPU the block attention; on other devices torch's choice, or the plain way where there is none."""
    q = torch.empty(1, 2, 8, 16)
    assert choose_backend(q, q, q, None, scale=1.0) == "block"
    meta = q.to("meta")
    assert choose_backend(meta, meta, meta, None, scale=1.0) == "math"
    assert set(causal._OF_TORCH.values()) < set(BACKENDS)


@pytest.mark.parametrize(
    ("chosen", "expected"), [("FLASH", "flash"), ("EFFICIENT", "efficient"), ("CUDNN", "cudnn"), ("MATH", "math")]
)
def test_choice_on_cuda_is_that_of_torch(chosen: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's numbers are read as its names say, and it is asked about a mask when there are documents."""
    asked = []

    def choice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object, *rest: object, scale: float) -> int:
        asked.append((mask, rest))
        number: int = torch.nn.attention.SDPBackend.__members__[
            f"{chosen}_ATTENTION".replace("MATH_ATTENTION", "MATH")
        ].value
        return number

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(2, 3, 8, 16, device="cuda")
        starts = torch.empty(2, 8, device="cuda", dtype=torch.int64)
        assert choose_backend(q, q, q, None, scale=1.0) == expected
        assert choose_backend(q, q, q, starts, scale=1.0) == expected
    assert asked[0] == (None, (0.0, True))
    assert asked[1][0].shape == (2, 1, 8, 8)
    assert asked[1][0].stride(-1) == 1
    assert asked[1][1] == (0.0, False)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", [None, "math", "flash", "efficient", "cudnn", "flex"])
@pytest.mark.parametrize("sizes", [(48, 32), (64, 64), (192, 128)])
def test_on_a_gpu(dtype: torch.dtype, packed: bool, backend: str | None, sizes: tuple[int, int]) -> None:
    if (backend in ("flash", "cudnn") and dtype == torch.float32) or (backend == "flash" and packed):
        pytest.skip("this kernel takes neither fp32 nor documents")
    width, value = sizes
    q, k, v = (
        random(2, 3, 300, size, seed=seed, dtype=dtype).detach().cuda()
        for seed, size in enumerate((width, width, value))
    )
    q[:, 1] *= 60 / width**0.5  # hot, so that the log-sum-exp certifies it
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    starts = documents(2, 300, 0).cuda() if packed else None
    expected, maxima, _ = plain(q.cpu(), k.cpu(), v.cpu(), 0.5, None if starts is None else starts.cpu())
    out, found = attention(q, k, v, starts, scale=0.5, with_max=True, backend=backend)
    tolerance = 1e-3 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.double().cpu(), expected, atol=tolerance, rtol=tolerance)
    assert abs(found.largest[1].item() - maxima[1].item()) < 1e-3 * max(1.0, maxima[1].item() / 130)
    assert (found.largest.double().cpu() >= maxima - 1e-3).all()
    out.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.gpu
@cuda
def test_no_host_sync_on_a_gpu() -> None:
    q, k, v = (random(2, 3, 256, 64, seed=seed, dtype=torch.bfloat16).detach().cuda() for seed in range(3))
    attention(q, k, v, scale=0.5, with_max=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, k, v, scale=0.5, with_max=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
