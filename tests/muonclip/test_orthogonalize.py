"""Newton-Schulz against the same polynomial in float64, and what it promises about scale, shape and batches."""

import pytest
import torch
from muonclip import newton_schulz
from muonclip.orthogonalize import orthogonalize_each


def oracle(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The quintic on the singular values, by a decomposition in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


def with_singular_values(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0][:, : len(values)]
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0][:, : len(values)]
    return (u * values) @ v.mT


HARD = {
    "random": lambda: torch.randn(48, 80, generator=torch.Generator().manual_seed(0)),
    "tall": lambda: torch.randn(80, 48, generator=torch.Generator().manual_seed(1)),
    "square": lambda: torch.randn(33, 33, generator=torch.Generator().manual_seed(2)),
    "one row": lambda: torch.randn(1, 17, generator=torch.Generator().manual_seed(3)),
    "rank 1": lambda: with_singular_values(torch.ones(1), 32, 48),
    "condition 1e6": lambda: with_singular_values(torch.logspace(0, -6, 32, dtype=torch.float64), 32, 48),
}


@pytest.mark.parametrize("name", HARD)
def test_float32_equals_the_polynomial_in_float64(name):
    matrix = HARD[name]()
    found = newton_schulz(matrix.float())
    assert found.dtype == torch.float32
    assert (found - oracle(matrix.float())).abs().max() <= 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-7, 1e12, 1e30])
def test_the_scale_of_a_matrix_does_not_matter(scale):
    matrix = HARD["random"]()
    torch.testing.assert_close(newton_schulz(matrix * scale), newton_schulz(matrix), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_one(dtype):
    values = torch.linalg.svdvals(newton_schulz(HARD["random"](), dtype=dtype).float())
    assert 0.6 < values.min() < values.max() < 1.25


def test_bfloat16_is_the_same_polynomial_up_to_its_rounding():
    matrix = HARD["random"]()
    found = newton_schulz(matrix, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert (found.float() - oracle(matrix)).norm() <= 0.05 * oracle(matrix).norm()


def test_zeros_stay_zeros_alone_and_in_a_batch():
    matrices = torch.stack([torch.zeros(4, 6), torch.randn(4, 6)])
    assert torch.equal(newton_schulz(matrices)[0], torch.zeros(4, 6))
    assert torch.equal(newton_schulz(torch.zeros(4, 6), dtype=torch.bfloat16), torch.zeros(4, 6, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 3, 5, 8)])
def test_a_batch_is_its_matrices_one_by_one(shape):
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    found = newton_schulz(batch)
    assert found.shape == batch.shape
    for result, matrix in zip(found.flatten(0, -3), batch.flatten(0, -3), strict=True):
        torch.testing.assert_close(result, newton_schulz(matrix), atol=1e-5, rtol=0)


def test_the_input_is_left_alone_and_may_be_a_view():
    base = torch.randn(10, 12, generator=torch.Generator().manual_seed(5))
    before = base.clone()
    torch.testing.assert_close(newton_schulz(base[::2, 1::3]), newton_schulz(base[::2, 1::3].contiguous()))
    assert torch.equal(base, before)


# In float32 a CPU takes matrices one by one: no batch, hence no rank, changes a bit of a matrix's result.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 0.0), (torch.bfloat16, 0.03)])
def test_many_shapes_at_once_keep_their_order(dtype, atol, monkeypatch):
    monkeypatch.setattr("muonclip.orthogonalize.BATCH_ELEMENTS", 100)  # so that equal shapes need several batches
    generator = torch.Generator().manual_seed(6)
    shapes = [(4, 6), (6, 4), (4, 6), (16, 16), (4, 6), (4, 6), (4, 6), (4, 6)]
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    for result, matrix in zip(orthogonalize_each(matrices, steps=5, dtype=dtype), matrices, strict=True):
        torch.testing.assert_close(result, newton_schulz(matrix, dtype=dtype), atol=atol, rtol=0)
