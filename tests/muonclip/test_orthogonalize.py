"""Newton-Schulz against the same polynomial in float64, and what it promises about scale, shape and batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from muonclip import POLAR_EXPRESS, QUINTIC, newton_schulz
from muonclip.orthogonalize import orthogonalize_each
from torch.utils._python_dispatch import TorchDispatchMode


def oracle(matrix: torch.Tensor, coefficients=((3.4445, -4.7750, 2.0315),) * 5) -> torch.Tensor:
    """The polynomials on the singular values, by a decomposition in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
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


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_many_shapes_at_once_keep_their_order(dtype, atol, monkeypatch):
    # So that equal shapes need several batches, and one matrix goes alone.
    monkeypatch.setattr("muonclip.orthogonalize.BATCH_ELEMENTS_OF_A_THREAD", 60 // torch.get_num_threads())
    generator = torch.Generator().manual_seed(6)
    shapes = [(4, 6), (6, 4), (4, 6), (16, 16), (4, 6), (4, 6), (4, 6), (4, 6)]
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    for result, matrix in zip(orthogonalize_each(matrices, coefficients=QUINTIC, dtype=dtype), matrices, strict=True):
        torch.testing.assert_close(result, newton_schulz(matrix, dtype=dtype), atol=atol, rtol=0)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize(
    "coefficients", [QUINTIC, POLAR_EXPRESS, QUINTIC[:1], ((2.0, -1.5, 0.5), *QUINTIC, (1.5, -0.5, 0.0))]
)
def test_any_list_of_coefficients_is_that_polynomial(coefficients, gram):
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(7))
    found = newton_schulz(matrix, coefficients=coefficients, gram=gram)
    assert (found - oracle(matrix, coefficients)).abs().max() <= 1e-5


def test_polar_express_comes_closer_to_one_than_the_quintic():
    """In float64: from singular values of 1e-3 on, as the paper says; the quintic leaves more of a spread."""
    values = torch.logspace(-3, 0, 10000, dtype=torch.float64)
    ends = {}
    for name, coefficients in (("quintic", QUINTIC), ("polar express", POLAR_EXPRESS)):
        s = values
        for a, b, c in coefficients:
            s = a * s + b * s**3 + c * s**5
        ends[name] = (s - 1).abs().max().item()
    assert ends["polar express"] < 0.16
    assert ends["quintic"] > 0.5


@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.floats(-20, 12),
    st.sampled_from(["random", "rank 1", "condition 1e6"]),
    st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_float32_equals_float64_for_any_shape_scale_and_spectrum(rows, columns, exponent, kind, seed):
    short = min(rows, columns)
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        matrix = torch.randn(rows, columns, generator=generator)
    else:
        values = torch.ones(1) if kind == "rank 1" else torch.logspace(0, -6, short)
        matrix = with_singular_values(values.double(), rows, columns).float()
    matrix = matrix * 10.0**exponent
    # Of a matrix of low rank the polynomial multiplies rounding errors by 3.4445**5 = 485, as it does all small
    # singular values: without a wide first step this would be 3e-5.
    assert (newton_schulz(matrix) - oracle(matrix)).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", [(300, 500), (1024, 256)])
def test_large_matrices_are_as_exact_by_their_small_entries(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], 1, generator=generator) @ torch.randn(1, shape[1], generator=generator)
    assert (newton_schulz(matrix) - oracle(matrix)).abs().max() <= 1e-5


@pytest.mark.parametrize("coefficients", [QUINTIC, POLAR_EXPRESS])
@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (3, 8, 24)])
def test_the_gram_form_is_the_same_polynomial(shape, coefficients):
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    found = newton_schulz(batch, coefficients=coefficients, gram=True)
    assert found.shape == batch.shape
    for result, matrix in zip(found.reshape(-1, *shape[-2:]), batch.reshape(-1, *shape[-2:]), strict=True):
        assert (result - oracle(matrix, coefficients)).abs().max() <= 2e-5


# Where the squares of small singular values drown in the rounding of the Gram matrix. Without a restart the relative
# errors in bfloat16 are above 20.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("kind", ["near-low rank", "condition"])
def test_the_gram_form_is_sane_where_singular_values_are_small(kind, smallest, dtype, bound):
    values = torch.full((32,), smallest, dtype=torch.float64)
    values[:2] = 1.0
    if kind == "condition":
        values = torch.logspace(0, math.log10(smallest), 32, dtype=torch.float64)
    matrix = with_singular_values(values, 32, 96).float()
    expected = oracle(matrix)
    error = {
        g: ((newton_schulz(matrix, dtype=dtype, gram=g) - expected).norm() / expected.norm()).item()
        for g in (False, True)
    }
    assert error[True] <= bound
    assert error[True] <= 10 * error[False]


def test_the_gram_form_needs_its_restart(monkeypatch):
    monkeypatch.setattr("muonclip.orthogonalize.gram_segments", lambda steps: [range(steps)])
    values = torch.full((32,), 1e-4, dtype=torch.float64)
    values[:2] = 1.0
    matrix = with_singular_values(values, 32, 96).float()
    assert newton_schulz(matrix, dtype=torch.bfloat16, gram=True).norm() > 5 * oracle(matrix).norm()


@pytest.mark.parametrize(("shape", "differs"), [((8, 23), False), ((23, 8), False), ((8, 24), True), ((24, 8), True)])
def test_the_gram_form_is_used_from_a_ratio_of_three(shape, differs):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    plain, gram = (newton_schulz(matrix, gram=gram) for gram in (False, True))
    assert torch.equal(plain, gram) != differs


def test_bfloat16_by_way_of_float32_rounds_every_product_of_bfloat16_numbers_once(monkeypatch):
    """Against sums in float64 of the same bfloat16 numbers, rounded once."""
    monkeypatch.setattr("muonclip.orthogonalize.cpu_multiplies_bfloat16", lambda: False)
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(10))
    low = (matrix / matrix.norm()).bfloat16()
    for a, b, c in QUINTIC[:1]:
        x = low.double()
        gram = (x @ x.mT).bfloat16().double()
        polynomial = (b * gram + c * gram @ gram).bfloat16().double()
        low = (a * x + polynomial @ x).bfloat16()
    found = newton_schulz(matrix, coefficients=QUINTIC[:1], dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    # A float32 sum on the edge between two bfloat16 numbers may fall to the other side.
    assert (found == low).float().mean() > 0.99
    assert (found.float() - low.float()).abs().max() <= 2**-8 * low.float().abs().max()


class Products(TorchDispatchMode):
    """Collects the dtypes in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            self.dtypes.add(out.dtype)
        return out


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("shape", [(8, 32), (2, 8, 32)])
def test_bfloat16_gives_the_same_numbers_with_and_without_support_of_the_cpu(monkeypatch, shape, gram):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(11))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        supported = dtype == torch.bfloat16
        monkeypatch.setattr("muonclip.orthogonalize.cpu_multiplies_bfloat16", lambda supported=supported: supported)
        with Products() as products:
            found.append(newton_schulz(matrices, dtype=torch.bfloat16, gram=gram).float())
        assert products.dtypes == {dtype}
    assert (found[0] - found[1]).norm() <= 0.03 * found[1].norm()
