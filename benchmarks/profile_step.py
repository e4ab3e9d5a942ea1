"""Where the time of a training step goes, part by part, and how much of each is matrix products.

    python benchmarks/profile_step.py --model base --batch 4 --length 512

The step is that of model_step.py: forward pass, loss, backward pass and torch's fused AdamW. The profiler adds a few
percent, and most to many small operations.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from measure import BFLOAT16, gemm_peak, machine
from model_step import DTYPES, flops, model_config, our_step
from torch.profiler import ProfilerActivity, profile

from k2train.model import build_model

PRODUCTS = {f"aten::{name}{end}" for name in ("mm", "addmm", "bmm", "baddbmm") for end in ("", "_")}
# By the start of the name of an operation or of one around it; the innermost decides.
PARTS = {
    "_ExpertLoop": "routed experts",
    "_BlockAttention": "attention",
    "_ChunkedCrossEntropy": "head and loss",
    "_RMSNorm": "norms",
    "_Heads": "rotation and heads",
    "Optimizer.step": "optimizer",
    "aten::silu": "SwiGLU of dense layers and shared experts",
    "aten::linear": "projections, dense layers, shared experts",
    "MmBackward": "projections, dense layers, shared experts",
    "aten::topk": "router",
    "aten::sigmoid": "router",
    "aten::argsort": "router",
    "aten::sort": "router",
    "aten::embedding": "embedding",
    "EmbeddingBackward": "embedding",
    "torch::autograd::AccumulateGrad": "gradients added up",
}
REST = "residuals and the rest"


def part_of(event: torch.autograd.profiler_util.FunctionEvent) -> str:
    """See ``PARTS``."""
    while event is not None:
        for start, part in PARTS.items():
            if event.name.startswith(start):
                return part
        event = event.cpu_parent
    return REST


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", help="of configs/model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if BFLOAT16 else "fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config, dtype = model_config(arguments.model), DTYPES[arguments.dtype]
    sizes = {"batch": arguments.batch, "length": arguments.length}
    step = our_step(build_model(config, seed=0, dtype=dtype).train(), **sizes)
    for number in range(2):
        step(number)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for number in range(arguments.steps):
            step(2 + number)
    all_of, products = defaultdict(float), defaultdict(float)
    for event in profiled.events():
        part, seconds = part_of(event), 1e-6 * event.self_cpu_time_total / arguments.steps
        all_of[part] += seconds
        products[part] += seconds * (event.name in PRODUCTS)
    total, busy = sum(all_of.values()), sum(products.values())
    ideal = flops(config, **sizes) / gemm_peak(dtype)
    print(f"{machine()}\n\n{arguments.model}, {arguments.dtype}, batch {arguments.batch}, T {arguments.length}.\n")
    print("| | ms a step | share | of it matrix products |\n| --- | ---: | ---: | ---: |")
    for part, seconds in sorted(all_of.items(), key=lambda item: -item[1]):
        print(f"| {part} | {1e3 * seconds:.1f} | {seconds / total:.1%} | {products[part] / total:.1%} |")
    print(f"| all | {1e3 * total:.1f} | 100 % | {busy / total:.1%} |")
    print(f"\nThe products run at {ideal / busy:.0%} of the GEMM peak, the step at {ideal / total:.0%}.")


if __name__ == "__main__":
    main()
