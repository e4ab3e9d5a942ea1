"""How far Newton-Schulz is from the same polynomial in float64, by precision, form, coefficients and spectrum.

    python benchmarks/orthogonalize_error.py

One matrix of 128 x 512 for each spectrum: random entries; rank 1; singular values spread evenly over a logarithmic
scale to a condition of 1e4 and 1e6; and nearly low rank: 8 singular values of 1, the others of 1e-4.
"""

from __future__ import annotations

import torch
from muonclip import POLAR_EXPRESS, QUINTIC, newton_schulz
from muonclip.orthogonalize import Coefficients
from torch import Tensor

ROWS, COLUMNS = 128, 512


def with_singular_values(values: Tensor) -> Tensor:
    """[ROWS, COLUMNS] in float32 with random singular vectors."""
    u = torch.linalg.qr(torch.randn(ROWS, ROWS, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, dtype=torch.float64))[0]
    return ((u[:, : len(values)] * values) @ v[:, : len(values)].mT).float()


def exact(matrix: Tensor, coefficients: Coefficients) -> Tensor:
    """The polynomials on the singular values, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return u * s @ v


def main() -> None:
    """Prints a Markdown table: the largest difference, and the relative error in the Frobenius norm."""
    torch.manual_seed(0)
    nearly_low = torch.full((ROWS,), 1e-4, dtype=torch.float64)
    nearly_low[:8] = 1.0
    spectra = {
        "random": torch.randn(ROWS, COLUMNS),
        "rank 1": with_singular_values(torch.ones(1, dtype=torch.float64)),
        "condition 1e4": with_singular_values(torch.logspace(0, -4, ROWS, dtype=torch.float64)),
        "condition 1e6": with_singular_values(torch.logspace(0, -6, ROWS, dtype=torch.float64)),
        "nearly low rank": with_singular_values(nearly_low),
    }
    forms = [(dtype, gram) for dtype in (torch.float32, torch.bfloat16) for gram in (False, True)]
    heads = [f"{str(dtype).removeprefix('torch.')}{', Gram' if gram else ''}" for dtype, gram in forms]
    print(f"| coefficients | matrix | {' | '.join(heads)} |\n| --- | --- |{' ---: |' * len(heads)}")
    for name, coefficients in (("quintic", QUINTIC), ("Polar Express", POLAR_EXPRESS)):
        for kind, matrix in spectra.items():
            expected = exact(matrix, coefficients)
            cells = []
            for dtype, gram in forms:
                error = newton_schulz(matrix, coefficients=coefficients, dtype=dtype, gram=gram) - expected
                cells.append(f"{error.abs().max():.0e}, {error.norm() / expected.norm():.0e}")
            print(f"| {name} | {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
