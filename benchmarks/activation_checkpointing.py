"""What train.activation_checkpointing saves in memory and costs in time, also beside train.compile.

    python benchmarks/activation_checkpointing.py --model base --batch 4 --length 512
    python benchmarks/activation_checkpointing.py --model base --batch 4 --length 512 --compile

One forward and backward pass over the same tokens for each choice. Memory is what the allocator of tensors has handed
out beyond weights and gradients, which exist before: kept from the forward to the backward pass, and at most. Being
counted, not sampled, it is the same in every run. Times are medians over rounds in random order, and so are ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import interleaved, interval, machine
from model_step import model_config, tokens
from torch.profiler import ProfilerActivity, profile, record_function

from k2train.config import ModelConfig
from k2train.model import Transformer, build_model, compile_parts

MODES = ("none", "selective", "full")
FORWARD_ENDS = "forward ends"  # a mark in the profile


def make_pass(model: Transformer, mode: str, *, batch: int, length: int) -> Callable[[int], None]:
    """A forward and backward pass over tokens that the number decides; the first makes the gradients."""

    def run(number: int) -> None:
        model.checkpoint_activations(mode)
        model.zero_grad(set_to_none=False)
        tokens_BT = tokens(model.config, batch=batch, length=length, number=number)
        loss_BT, balance = model(tokens_BT, tokens_BT.roll(-1, 1))
        with record_function(FORWARD_ENDS):
            pass
        (loss_BT.mean() + balance).backward()

    return run


def memory(run: Callable[[int], None]) -> tuple[int, int]:
    """Bytes kept for the backward pass, and at most, of one pass."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run(0)
    assert found.profiler is not None
    events = sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    used = kept = peak = 0
    for event in events:
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
        elif event.name() == FORWARD_ENDS:
            kept = used
    return kept, peak


def compare(config: ModelConfig, *, batch: int, length: int, rounds: int, compiled: bool) -> None:
    """Prints a table."""
    model = build_model(config, seed=0).train()
    passes = {mode: make_pass(model, mode, batch=batch, length=length) for mode in MODES}
    if compiled:
        other = build_model(config, seed=0).train()
        compile_parts(other)
        passes |= {f"{mode}, compiled": make_pass(other, mode, batch=batch, length=length) for mode in MODES}
    for run in passes.values():
        run(0)
    found = {name: memory(run) for name, run in passes.items()}
    seconds = interleaved(passes, rounds=rounds)
    print("| | kept, MiB | peak, MiB | of none's | ms a pass | times none's (95 % interval) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (kept, peak) in found.items():
        median, *_ = interval(seconds[name])
        ratio, low, high = interval([a / b for a, b in zip(seconds[name], seconds["none"], strict=True)])
        print(
            f"| {name} | {kept / 2**20:.0f} | {peak / 2**20:.0f} | {peak / found['none'][1]:.2f} "
            f"| {1e3 * median:.0f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |"
        )


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", help="of configs/model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="each choice with torch.compile too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{machine()}\n\n{arguments.model}, fp32, batch {arguments.batch}, T {arguments.length}.\n")
    compare(
        model_config(arguments.model),
        batch=arguments.batch,
        length=arguments.length,
        rounds=arguments.rounds,
        compiled=arguments.compile,
    )


if __name__ == "__main__":
    main()
