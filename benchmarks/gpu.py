"""What a GPU does with k2train: products, the optimizer's step, attention with its max logits, a training step.

    python benchmarks/gpu.py > gpu.md

Takes one CUDA device and some minutes, and prints a Markdown table with the device and the versions; what it is doing
meanwhile goes to standard error. Ratios are medians of interleaved pairs, with the middle 90 % of them.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from muonclip import MuonClip

import k2train
from k2train.config import ModelConfig, parse
from k2train.model import build_model
from k2train.model.causal import attention

DEVICE = "cuda"
PAIRS = 20
WARM_UP = 3
TRAINING_TIMEOUT = 300  # seconds; all else takes about one minute
# The shapes of docs: hidden matrices of one block, and its experts.
SHAPES = [(1024, 1024)] * 2 + [(1024, 4096)] + [(512, 256)] * 16
Row = tuple[str, str, str]  # what, how much, remark


def seconds(function: Callable[[], object]) -> float:
    """Of one call, from an idle device to an idle device."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def pairs(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float, str]:
    """Median seconds of both, and the ratio second / first with its spread."""
    for _ in range(WARM_UP):
        first(), second()
    times = [(seconds(first), seconds(second)) for _ in range(PAIRS)]
    ratios = sorted(b / a for a, b in times)
    low, high = ratios[PAIRS // 20], ratios[-1 - PAIRS // 20]
    text = f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times), text


def gemm(dtype: torch.dtype, *, size: int = 8192) -> float:
    """FLOP/s of a large product."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    for _ in range(WARM_UP):
        a @ b
    return 2 * size**3 / statistics.median(seconds(lambda: a @ b) for _ in range(PAIRS))


def optimizer_rows(name: str, shapes: Sequence[tuple[int, int]]) -> list[Row]:
    """A step of MuonClip against torch.optim.Muon, both with Newton-Schulz in bf16, weights and gradients in fp32."""
    ours, theirs = ([torch.nn.Parameter(0.02 * torch.randn(s, device=DEVICE)) for s in shapes] for _ in range(2))
    for p in (*ours, *theirs):
        p.grad = torch.randn_like(p)
    group = {"params": [(str(n), p) for n, p in enumerate(ours)], "algorithm": "muon"}
    mine = MuonClip([group], lr=0.01, newton_schulz_dtype=torch.bfloat16)
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before, after, ratio = pairs(other.step, mine.step)
    return [
        (f"optimizer step, {name}: torch.optim.Muon", f"{before * 1e3:.2f} ms", f"{len(shapes)} matrices"),
        (f"optimizer step, {name}: MuonClip", f"{after * 1e3:.2f} ms", f"ratio {ratio}"),
    ]


def attention_rows(tokens: int, *, batch: int = 4, heads: int = 16) -> list[Row]:
    """Forward and backward with K2's head widths (192 and 128) in bf16, without and with max logits."""
    q, k, v = (
        torch.randn(batch, heads, tokens, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for width in (192, 192, 128)
    )

    def run(*, with_max: bool) -> None:
        out, _ = attention(q, k, v, scale=192**-0.5, with_max=with_max)
        out.sum().backward()

    without, with_max, ratio = pairs(lambda: run(with_max=False), lambda: run(with_max=True))
    return [
        (f"attention, {tokens} tokens, without max logits", f"{without * 1e3:.2f} ms", "forward and backward"),
        (f"attention, {tokens} tokens, with max logits", f"{with_max * 1e3:.2f} ms", f"ratio {ratio}"),
    ]


def training_rows(peak: float) -> list[Row]:
    """A run of the model ``base`` by the command line, with DeepSpeed; the median of its later steps."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["model=base", "name=gpu", f"runs_dir={folder}", "track=off", f"train.device={DEVICE}"]
        words += ["train.precision=bf16", "train.sequence_length=1024", "schedule.steps=30", "schedule.warmup_steps=5"]
        words += ["validate.every=0", "checkpoint.every=0", "track.log_every=1"]
        command = [sys.executable, "-m", "k2train", "train", *words]
        subprocess.run(command, check=True, stdout=sys.stderr, timeout=TRAINING_TIMEOUT)
        lines = (Path(folder) / "gpu" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        summary = json.loads((Path(folder) / "gpu" / "summary.json").read_text(encoding="utf-8"))
    speeds = [r["tokens_per_second"] for r in map(json.loads, lines) if r.get("step", 0) > 10 and "loss" in r]
    speed = statistics.median(speeds)
    share = 6 * summary["parameters_active"] * speed / peak
    return [
        ("training, model base, bf16, 16 x 1024 tokens a step", f"{speed:,.0f} tokens/s", f"{share:.1%} of the peak")
    ]


def matrices_of_base() -> list[tuple[int, int]]:
    """The hidden matrices of the model ``base``, each expert one."""
    import yaml

    text = (Path(__file__).parents[1] / "configs" / "model" / "base.yaml").read_text(encoding="utf-8")
    model = build_model(parse(ModelConfig, yaml.safe_load(text) | {"vocab_size": 4096}), seed=0, device="meta")
    roles = model.parameter_roles()
    return [
        (p.shape[-2], p.shape[-1])
        for n, p in model.named_parameters()
        if roles[n] in ("attention", "mlp", "expert", "router")
        for _ in range(len(p) if p.ndim == 3 else 1)
    ]


def about() -> list[Row]:
    """The device and the versions."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    memory = f"{properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}"
    versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, driver {driver}"
    return [
        ("device", properties.name, memory),
        ("torch", torch.__version__, versions),
        ("k2train", k2train.__version__, f"Python {platform.python_version()}"),
    ]


def measure() -> list[Row]:
    """All rows, each part announced on standard error."""
    rows = about()
    print("products", file=sys.stderr)
    peak = gemm(torch.bfloat16)
    rows += [("GEMM 8192, bf16", f"{peak / 1e12:.0f} TFLOP/s", "the peak")]
    rows += [("GEMM 8192, fp32", f"{gemm(torch.float32) / 1e12:.0f} TFLOP/s", "TF32 off")]
    print("optimizer", file=sys.stderr)
    rows += optimizer_rows("19 matrices", SHAPES) + optimizer_rows("model base", matrices_of_base())
    print("attention", file=sys.stderr)
    for tokens in (512, 2048, 4096):
        rows += attention_rows(tokens)
    print("training", file=sys.stderr)
    return rows + training_rows(peak)


def table(rows: Sequence[Row]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(["| what | result | |", "| --- | --- | --- |", *lines])


def main() -> int:
    """Prints the table; 2 if there is nothing to measure on."""
    if not torch.cuda.is_available():
        print(
            f"benchmarks/gpu.py needs a CUDA device, and torch {torch.__version__} sees none: "
            "run it on a machine with an NVIDIA GPU and a CUDA build of torch",
            file=sys.stderr,
        )
        return 2
    print(table(measure()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
