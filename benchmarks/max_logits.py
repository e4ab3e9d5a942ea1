"""What the largest logits cost, as a share of attention forward and backward, and how exact they are.

    python benchmarks/max_logits.py [--seconds 8] [--threads 1]

With and without are run in turn, in alternating order, for so many seconds a line and 20 pairs at least; a share is
the median over the pairs, with the interval that holds the true median with 95 %. On a CPU with one thread the clock
is the process's own, so that other work on the machine disturbs less. Shapes: B batch, H heads, T tokens, d query and
key dims, V value dims.

The bars, at T >= 512: 1 % when healthy, 2 % with a quarter of the heads hot (largest logit 160); error 1e-3 there.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import interval
from torch import Tensor

from k2train.model import causal
from k2train.model.causal import attention, choose_backend
from k2train.model.max_logits import max_logits_by_blocks

# (B, H, T, d, V): the heads of the model `nano`, and wider ones up to Kimi K2's.
SHAPES = [
    (16, 4, 256, 48, 32),
    (8, 4, 512, 48, 32),
    (2, 4, 2048, 48, 32),
    (1, 4, 4096, 48, 32),
    (2, 8, 512, 96, 64),
    (1, 8, 2048, 96, 64),
    (1, 8, 512, 192, 128),
    (1, 8, 2048, 192, 128),
]
PAIRS = 20
HOT = 160.0
TAU = 100.0
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(B: int, H: int, T: int, d: int, V: int, *, hot: bool, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output; if hot, a quarter of the heads have HOT as their largest logit."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(B, H, T, size, generator=generator) for size in (d, d, V, V))
    if hot:
        largest = max_logits_by_blocks(q, k, scale=d**-0.5)
        q[:, : H // 4] *= (HOT / largest)[: H // 4, None, None]
    return [x.to(device, dtype).requires_grad_(x is not grad) for x in (q, k, v, grad)]


def compare(
    without: Run, with_: Run, tensors: list[Tensor], *, limit: float, clock: Callable[[], float]
) -> list[float]:
    """Time of ``with_`` over time of ``without``, both forward and backward, for each pair."""
    q, k, v, grad = tensors

    def seconds(run: Run) -> float:
        begin = clock()
        run(q, k, v).backward(grad)
        end = clock()
        q.grad = k.grad = v.grad = None
        return end - begin

    seconds(without), seconds(with_)
    ratios: list[float] = []
    end = time.perf_counter() + limit
    while len(ratios) < PAIRS or time.perf_counter() < end:
        order = (without, with_) if len(ratios) % 2 else (with_, without)
        found = {run: seconds(run) for run in order}
        ratios.append(found[with_] / found[without])
    return ratios


def share_inside(tensors: list[Tensor], *, backend: str, clock: Callable[[], float]) -> list[float]:
    """What finding the maxima took within each of PAIRS runs on a CPU, over the rest of that run."""
    q, k, v, grad = tensors
    owner, name = (torch, "amax") if backend == "block" else (causal, "_from_lse")
    original, spent = getattr(owner, name), 0.0

    def timed(*args: object, **options: object) -> object:
        nonlocal spent
        begin = clock()
        result = original(*args, **options)
        spent += clock() - begin
        return result

    shares = []
    setattr(owner, name, timed)
    try:
        for _ in range(PAIRS):
            spent, begin = 0.0, clock()
            run(q, k, v, scale=q.shape[-1] ** -0.5, with_max=True, backend=backend).backward(grad)
            shares.append(spent / (clock() - begin - spent))
    finally:
        setattr(owner, name, original)
    return shares


def error(q: Tensor, k: Tensor, largest: Tensor, *, scale: float) -> float:
    """Largest difference of a hot head's maximum from float64."""
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    worst = 0.0
    for head in range(q.shape[1] // 4):
        exact = max(
            (q[b, head].double().cpu() @ k[b, head].double().cpu().T).masked_fill_(hidden, float("-inf")).max().item()
            for b in range(len(q))
        )
        worst = max(worst, abs(exact * scale - largest[head].item()))
    return worst


def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float, with_max: bool, backend: str | None) -> Tensor:
    return attention(q, k, v, scale=scale, with_max=with_max, exact_above=TAU, backend=backend)[0]


def run_and_pass(q: Tensor, k: Tensor, v: Tensor, *, scale: float, backend: str) -> Tensor:
    with torch.no_grad():
        max_logits_by_blocks(q, k, scale=scale)
    return run(q, k, v, scale=scale, with_max=False, backend=backend)


def run_torchs(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    padded = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    return F.scaled_dot_product_attention(q, k, padded, is_causal=True, scale=scale)[..., : v.shape[-1]]


def print_inside(clock: Callable[[], float]) -> None:
    """The same shares as the first table, timed within the call: less at the mercy of a busy machine."""
    print(f"\nMaxima timed within the call, a share of the rest of it, median of {PAIRS} runs\n")
    print("| B, H, T, d, V | heads | block | flash_cpu |")
    print("| --- | --- | --- | --- |")
    for shape in SHAPES:
        for hot in (False, True):
            tensors = inputs(*shape, hot=hot, device="cpu", dtype=torch.float32)
            cells = [", ".join(map(str, shape)), "a quarter hot" if hot else "healthy"]
            for backend in ("block", "flash_cpu"):
                shares = share_inside(tensors, backend=backend, clock=clock)
                median, low, high = (100 * x for x in interval(shares))
                cells.append(f"{median:.2f} % ({low:.2f} to {high:.2f})")
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if device == "cpu" and options.threads == 1 else time.perf_counter()

    print(f"torch {torch.__version__}, {device}, {dtype}, {options.threads} threads, {options.seconds:g} s a line\n")
    print("| B, H, T, d, V | heads | back end | maxima | share of forward + backward | error of a hot head |")
    print("| --- | --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        scale = shape[3] ** -0.5
        for hot in (False, True):
            tensors = inputs(*shape, hot=hot, device=device, dtype=dtype)
            q, k, v, _ = tensors
            chosen = choose_backend(q, k, v, None, scale=scale)
            for backend in dict.fromkeys((chosen, "flash_cpu" if device == "cpu" else chosen)):
                without = functools.partial(run, scale=scale, with_max=False, backend=backend)
                runs: dict[str, Run] = {"own": functools.partial(run, scale=scale, with_max=True, backend=backend)}
                if backend != "block" and not hot:
                    runs["chunked pass"] = functools.partial(run_and_pass, scale=scale, backend=backend)
                for name, with_ in runs.items():
                    ratios = compare(without, with_, tensors, limit=options.seconds, clock=clock)
                    median, low, high = (100 * (x - 1) for x in interval(ratios))
                    wrong = ""
                    if hot:
                        maxima = attention(q, k, v, scale=scale, with_max=True, exact_above=TAU, backend=backend)[1]
                        assert maxima is not None
                        wrong = f"{error(q, k, maxima.largest, scale=scale):.1e}, {int(maxima.fallbacks)} fallbacks"
                    cells = (
                        ", ".join(map(str, shape)),
                        "a quarter hot" if hot else "healthy",
                        backend,
                        name,
                        f"{median:.2f} % ({low:.2f} to {high:.2f}; {len(ratios)} pairs)",
                        wrong,
                    )
                    print(f"| {' | '.join(cells)} |", flush=True)
    if device == "cpu":
        print_inside(clock)
    print("\nAttention with maxima against torch's own (scaled_dot_product_attention, values padded to d)\n")
    print("| B, H, T, d, V | time of torch's / time of this |")
    print("| --- | --- |")
    for shape in SHAPES:
        tensors = inputs(*shape, hot=False, device=device, dtype=dtype)
        scale = shape[3] ** -0.5
        ours = functools.partial(run, scale=scale, with_max=True, backend=None)
        ratios = compare(ours, functools.partial(run_torchs, scale=scale), tensors, limit=options.seconds, clock=clock)
        median, low, high = interval(ratios)
        print(f"| {', '.join(map(str, shape))} | {median:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


if __name__ == "__main__":
    main()
