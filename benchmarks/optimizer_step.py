"""How long an optimizer step takes beside other implementations of Muon, on the same matrices and threads.

    python benchmarks/optimizer_step.py --threads 1
    python benchmarks/optimizer_step.py --shapes few --peers-in bfloat16 --rounds 5

In a round every contestant makes one step, in random order. Printed are the median over rounds of its time over that of
MuonClip in float32 in the same round (below 1: faster), and the order statistics that hold the median with 95 %
confidence. With one thread the time is that of the processor, so that other work on the machine counts less.

Peers are measured if they can be imported: pip install --no-deps --target DIR muon-optimizer optimuon
pytorch-optimizer, then PYTHONPATH=DIR. All make five steps of Newton-Schulz, with the quintic's coefficients.

Where a CPU has no bfloat16 products, torch falls back to a loop that takes more than ten times as long as float32.
There the peers are measured in float32 by default: their own code, with float32 put in the place of bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from measure import BFLOAT16, interleaved, interval, machine
from muonclip import MuonClip

Shape = tuple[int, ...]
SHAPES: dict[str, list[Shape]] = {
    "mixed": [(1024, 1024)] * 2 + [(1024, 4096)] + [(512, 256)] * 16,
    "4 to 1": [(1024, 4096)],
    "thousand small": [(32, 64)] * 1000,
    "few": [(96, 192)] * 4 + [(64, 256)] * 2,
}
REFERENCE = "MuonClip, float32"
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def default_model() -> list[Shape]:
    """What Muon gets of the model that ``k2train train`` trains without settings; stacks of experts as such."""
    from k2train.cli.commands import TRAIN
    from k2train.cli.compose import compose
    from k2train.config import MUON_ROLES, RunConfig, parse
    from k2train.model import build_model

    config = parse(RunConfig, compose(TRAIN, ["model.vocab_size=4096"]))
    model = build_model(config.model, seed=0, device="meta")
    roles = model.parameter_roles()
    return [tuple(p.shape) for name, p in model.named_parameters() if roles[name] in MUON_ROLES]


@contextlib.contextmanager
def float32_for_bfloat16(active: bool) -> Iterator[None]:
    """Whatever is imported or run inside computes in float32 where it asks for bfloat16."""
    with contextlib.ExitStack() as stack:
        if active:
            stack.enter_context(mock.patch.object(torch, "bfloat16", torch.float32))
            stack.enter_context(mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float))
        yield


def own(**settings: object) -> Make:
    return lambda params: MuonClip(
        [{"params": [(str(i), p) for i, p in enumerate(params)], "algorithm": "muon"}], lr=1e-3, **settings
    )


def contestants() -> dict[str, Make]:
    bf16 = {"newton_schulz_dtype": torch.bfloat16}
    return {
        REFERENCE: own(),
        "MuonClip, float32, Gram": own(newton_schulz_gram=True),
        "MuonClip, bfloat16": own(**bf16),
        "MuonClip, bfloat16, Gram": own(**bf16, newton_schulz_gram=True),
    }


def peers() -> tuple[dict[str, Make], list[str]]:
    """Other implementations, and what could not be imported."""
    found: dict[str, Make] = {
        "torch.optim.Muon": lambda p: torch.optim.Muon(p, adjust_lr_fn="match_rms_adamw"),
        "torch.optim.AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    }
    absent = []
    for add in (_deepspeed, _keller_jordan, _optimuon, _pytorch_optimizer):
        try:
            found |= add()
        except ImportError as error:
            absent.append(f"{add.__name__[1:]} ({error})")
    return found, absent


def _deepspeed() -> dict[str, Make]:
    import deepspeed.runtime.zero.muon.original_muon as module

    # Its functions are compiled for each shape at first use, which says nothing about a step.
    torch._dynamo.config.disable = True
    return {
        "DeepSpeed's Muon, standard": lambda p: module.SingleDeviceMuon(p, ns_method="standard"),
        "DeepSpeed's Muon, Gram": lambda p: module.SingleDeviceMuon(p, ns_method="gram"),
    }


def _keller_jordan() -> dict[str, Make]:
    from muon import SingleDeviceMuon

    return {"muon-optimizer (Keller Jordan's)": SingleDeviceMuon}


def _optimuon() -> dict[str, Make]:
    from optimuon import Muon

    def make(gram: bool) -> Make:
        return lambda p: Muon(
            p,
            weight_decay=0.1,
            ns_coefficients=(3.4445, -4.7750, 2.0315),
            ns_norm_scale=1.0,
            ns_dtype=torch.bfloat16,
            gram_ns=gram,
            adjust_lr="match_rms_adamw",
            momentum_type="classical",
            normuon=False,
        )

    return {"optimuon": make(False), "optimuon, Gram": make(True)}


def _pytorch_optimizer() -> dict[str, Make]:
    from pytorch_optimizer import Muon

    return {
        "pytorch-optimizer": lambda p: Muon(
            [{"params": p, "use_muon": True}], weight_decay=0.1, use_adjusted_lr=True, ns_method="newton_schulz"
        )
    }


def parameters(shapes: list[Shape], *, stacks: bool) -> list[torch.nn.Parameter]:
    """With gradients; a stack is one parameter, or for those that take matrices alone, one for each matrix."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        values = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        params += [values] if stacks or values.ndim == 2 else list(values)
    found = [torch.nn.Parameter(p.clone()) for p in params]
    for p in found:
        p.grad = torch.randn(p.shape, generator=generator)
    return found


def stepping(optimizer: torch.optim.Optimizer, patched: bool) -> Callable[[int], None]:
    """A step, in float32 for bfloat16 if ``patched``."""

    def step(_: int) -> None:
        with float32_for_bfloat16(patched):
            optimizer.step()

    return step


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shapes", choices=[*SHAPES, "default model"], default="mixed")
    parser.add_argument("--peers-in", choices=["float32", "bfloat16"], default="bfloat16" if BFLOAT16 else "float32")
    parser.add_argument("--only", help="contestants whose names contain this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = default_model() if arguments.shapes == "default model" else SHAPES[arguments.shapes]
    patched = arguments.peers_in == "float32"
    with float32_for_bfloat16(patched):
        others, absent = peers()
    ours = contestants()
    chosen = {n: m for n, m in (ours | others).items() if n == REFERENCE or (arguments.only or n) in n}
    print(machine("deepspeed", "muon-optimizer", "optimuon", "pytorch-optimizer"))
    print(f"\nShapes: {arguments.shapes}; peers in {arguments.peers_in}; {arguments.rounds} rounds.\n")
    print("| contestant | ms a step | median ratio | interval |\n| --- | ---: | ---: | ---: |")
    steps = {}
    for name, make in chosen.items():
        with float32_for_bfloat16(name in others and patched):
            optimizer = make(parameters(shapes, stacks=name in ours))
        steps[name] = stepping(optimizer, name in others and patched)
    seconds = interleaved(steps, rounds=arguments.rounds)
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds[REFERENCE], strict=True)]
        median, low, high = interval(ratios)
        print(f"| {name} | {1e3 * statistics.median(found):.1f} | {median:.2f} | {low:.2f} to {high:.2f} |")
    if absent:
        print(f"\nNot measured: {'; '.join(absent)}.")


if __name__ == "__main__":
    main()
