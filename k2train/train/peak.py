"""How many floating-point operations a second a device can do at most: as its maker lists it, else as measured."""

from __future__ import annotations

import math
import time

import torch

# Dense bf16 matrix products without sparsity, FLOP/s, from the makers' data sheets; the first name that is in the
# device's counts.
LISTED = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "A10G": 70e12,
    "4090": 165e12,
}
SIZE = {"cpu": 512, "cuda": 8192}  # of the matrices that are multiplied
SECONDS = 0.1  # that are multiplied for, after a first product


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this process's device in products of ``dtype``, with the threads that it has."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        listed = next((flops for part, flops in LISTED.items() if part in name), None)
        if listed is not None:
            return listed
    return measured_peak(device, dtype)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some square products."""
    size = SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    best, end = math.inf, time.perf_counter() + SECONDS
    while (begin := time.perf_counter()) < end or not math.isfinite(best):
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
