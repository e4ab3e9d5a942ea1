"""What a mixture-of-experts layer costs beside its bare products, forward and backward.

    python benchmarks/experts.py --model base --tokens 2048

Ours is the whole routed path: router, permutation, experts, weighted sum. Bare are the three grouped products of the
experts (F.grouped_mm) with SwiGLU between them, on tokens that lie sorted already, and their gradients as autograd
makes them. A bar of 1.10 was set for the ratio. The tokens are other ones in each round, as in training.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import interleaved, interval, machine
from model_step import DTYPES, model_config
from torch import Tensor

from k2train.model.init import materialise
from k2train.model.moe import MoE

Work = Callable[[int], None]


def inputs(count: int, width: int, dtype: torch.dtype, *, number: int) -> tuple[Tensor, Tensor]:
    """Tokens [count, width] of size 1, as after a norm, and a gradient of their outputs."""
    generator = torch.Generator().manual_seed(number)
    x, grad = (torch.randn(count, width, generator=generator).to(dtype) for _ in range(2))
    return x.requires_grad_(), grad


def routed(moe: MoE, batches: list[tuple[Tensor, Tensor]]) -> Work:
    """Router, dispatch and experts, on another batch in each round."""

    def work(number: int) -> None:
        x_ND, grad_ND = batches[number]
        index_NK, weights_NK, loads_E, _ = moe.gate(x_ND[None])
        moe.experts(x_ND, index_NK, weights_NK, loads_E).backward(grad_ND)
        moe.zero_grad()

    return work


def bare(moe: MoE, loads_E: Tensor, batch: tuple[Tensor, Tensor]) -> Work:
    """The products alone."""
    experts, offsets = moe.experts, loads_E.cumsum(0, dtype=torch.int32)
    x_MD, grad_MD = batch

    def work(_: int) -> None:
        gate = F.grouped_mm(x_MD, experts.w1.transpose(1, 2), offs=offsets)
        up = F.grouped_mm(x_MD, experts.w3.transpose(1, 2), offs=offsets)
        F.grouped_mm(F.silu(gate) * up, experts.w2.transpose(1, 2), offs=offsets).backward(grad_MD)
        moe.zero_grad()
        x_MD.grad = None

    return work


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", help="of configs/model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config, dtype = model_config(arguments.model), DTYPES[arguments.dtype]
    with torch.device("meta"):
        moe = MoE(config)
    materialise(moe, device="cpu", seed=0, config=config, first_expert=0)
    moe = moe.to(dtype).train()
    count, width, top_k = arguments.tokens, config.hidden_size, config.num_experts_per_tok
    batches = [inputs(count, width, dtype, number=number) for number in range(arguments.rounds + 1)]
    with torch.no_grad():
        loads_E = moe.gate(batches[0][0][None])[2]
    works = {
        "router, permutation, experts": routed(moe, batches),
        "bare products": bare(moe, loads_E, inputs(count * top_k, width, dtype, number=0)),
    }
    seconds = interleaved(works, rounds=arguments.rounds)
    print(
        f"{machine()}\n\n{arguments.model}, {arguments.dtype}: {count} tokens to {top_k} of {config.n_routed_experts}"
    )
    print(f"experts, {width} wide, {config.moe_intermediate_size} inside.\n")
    print("| | ms |\n| --- | ---: |")
    for name, found in seconds.items():
        print(f"| {name} | {1e3 * statistics.median(found):.1f} |")
    ours, theirs = seconds.values()
    ratio, low, high = interval([a / b for a, b in zip(ours, theirs, strict=True)])
    print(f"\n{ratio:.2f} times the bare products ({low:.2f} to {high:.2f}).")


if __name__ == "__main__":
    main()
