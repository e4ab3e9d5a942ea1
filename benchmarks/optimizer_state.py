"""Bytes of optimizer state for each parameter, counted after a step: MuonClip beside AdamW and other forms of Muon.

    python benchmarks/optimizer_state.py

Muon's state is one number for each weight, AdamW's two. What DeepSpeed's Muon keeps is counted without ZeRO, which adds
its own copy of the weights in float32 to whichever optimizer it is given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from muonclip import MuonClip
from optimizer_step import peers

SHAPE = (256, 512)
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def own(algorithm: str, momentum_dtype: torch.dtype = torch.float32) -> Make:
    return lambda params: MuonClip(
        [{"params": [(str(i), p) for i, p in enumerate(params)], "algorithm": algorithm}],
        lr=1e-3,
        momentum_dtype=momentum_dtype,
    )


def bytes_per_parameter(make: Make, dtype: torch.dtype) -> float:
    """After one step, over all tensors that the optimizer keeps."""
    parameter = torch.nn.Parameter(torch.randn(SHAPE).to(dtype))
    optimizer = make([parameter])
    parameter.grad = torch.randn(SHAPE).to(dtype)
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(value.numel() * value.element_size() for value in held) / parameter.numel()


def main() -> None:
    """Prints a Markdown table."""
    makes = {
        "MuonClip, matrices": own("muon"),
        "MuonClip, matrices, momentum in bfloat16": own("muon", torch.bfloat16),
        "MuonClip, the rest (AdamW)": own("adamw"),
    }
    others, absent = peers()
    print("| optimizer | float32 weights | bfloat16 weights |\n| --- | ---: | ---: |")
    for name, make in (makes | others).items():
        found = [bytes_per_parameter(make, dtype) for dtype in (torch.float32, torch.bfloat16)]
        print(f"| {name} | {found[0]:.2f} | {found[1]:.2f} |")
    if absent:
        print(f"\nNot measured: {'; '.join(absent)}.")


if __name__ == "__main__":
    main()
