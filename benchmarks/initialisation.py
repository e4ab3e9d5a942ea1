"""What the scheme of initialisation changes: the residual stream by depth at the start, and the loss of short runs.

    python benchmarks/initialisation.py [--layers 12] [--steps 100] [--seeds 3]

The model is `nano` with more layers, on bytes of Python's standard library (modules of `asyncio`, 8 x 128 bytes a
step, the same for both schemes), trained by MuonClip at a constant learning rate after ten steps of warm-up. The loss
is the mean over the last ten steps. Everything is fp32 on one CPU thread.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from muonclip import MuonClip, QKClip, split_parameters
from torch import Tensor

from k2train.config import ModelConfig, parse
from k2train.model import Transformer, build_model
from k2train.paths import config_dir

BATCH, LENGTH = 8, 128
LR, WARMUP = 0.01, 10
LAST = 10  # steps that the final loss is a mean of
SCHEMES = ("normal", "depth_scaled")
HIDDEN_MATRICES = ("attention", "mlp", "expert", "router")


def batches(seed: int) -> Iterator[Tensor]:
    """[B, T + 1] bytes, at random places of the text."""
    files = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    text = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(LENGTH + 1)]


@torch.no_grad()
def residual_rms(model: Transformer, tokens_BT: Tensor) -> list[float]:
    """Root mean square of the residual stream behind the embedding and behind each layer."""
    found = [model.embed_tokens(tokens_BT).square().mean().sqrt().item()]
    hooks = [
        layer.register_forward_hook(lambda _, __, out: found.append(out[0].square().mean().sqrt().item()))
        for layer in model.layers
    ]
    model.eval().logits(tokens_BT)
    for hook in hooks:
        hook.remove()
    return found


def final_loss(model: Transformer, *, steps: int, seed: int) -> float:
    """Nats a byte after a short run."""
    groups = split_parameters(model.named_parameters(), model.parameter_roles())
    for group in groups:
        group["algorithm"] = "muon" if group["role"] in HIDDEN_MATRICES else "adamw"
        group["weight_decay"] = 0.0 if group["role"] == "norm" else 0.1
    optimizer = MuonClip(groups, lr=LR, qk_clip=QKClip(model.attention_layers(), tau=100.0))
    losses = []
    model.train()
    for step, text in zip(range(steps), batches(seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        loss_BT, balance = model(text[:, :-1], text[:, 1:])
        (loss_BT.mean() + balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_BT.mean().item())
    return statistics.mean(losses[-LAST:])


def main() -> None:
    """Prints two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    nano = parse(ModelConfig, yaml.safe_load((config_dir() / "model" / "nano.yaml").read_text()))
    nano = dataclasses.replace(nano, vocab_size=256, num_hidden_layers=options.layers)
    depths = [0, *(layers for layers in (1, 2, 4, 8, 16, 32) if layers < options.layers), options.layers]
    print("| RMS of the residual stream behind layer | " + " | ".join(map(str, depths)) + " |")
    print("| --- |" + " --- |" * len(depths))
    configs = {scheme: dataclasses.replace(nano, initializer_scheme=scheme) for scheme in SCHEMES}
    for scheme, config in configs.items():
        rms = residual_rms(build_model(config, seed=0), next(batches(0))[:, :-1])
        print(f"| {scheme} | " + " | ".join(f"{rms[depth]:.4f}" for depth in depths) + " |")
    steps = f"{options.steps - LAST + 1} to {options.steps}"
    print(f"\n| nats a byte, steps {steps} | mean | each seed |\n| --- | --- | --- |")
    for scheme, config in configs.items():
        losses = [
            final_loss(build_model(config, seed=seed), steps=options.steps, seed=seed) for seed in range(options.seeds)
        ]
        print(f"| {scheme} | {statistics.mean(losses):.4f} | " + ", ".join(f"{loss:.4f}" for loss in losses) + " |")


if __name__ == "__main__":
    main()
