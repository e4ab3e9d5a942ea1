"""Does a small model find needles beyond the context that it was trained on, before and after a YaRN phase?

    python benchmarks/needle.py --seeds 2

Text is random bytes in which pairs ``SET key value`` are hidden; a later ``ASK key`` is to be answered by the value. A
model of K2's shape learns that in sequences of 32 tokens and then of SHORT. Copies of it go on for a few steps in
sequences of LONG, as a phase of a schedule would have them: one with YaRN, one with positions as they were. What is
measured, on text of its own, is how often the value is the likeliest of all tokens, by how many tokens before it was
set. Shapes: B rows, T tokens.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator

import torch
from measure import machine
from model_step import model_config
from muonclip import MuonClip, QKClip, split_parameters
from torch import Tensor

from k2train.config import RopeScalingConfig
from k2train.model import Transformer, build_model, update_bias

SHORT, LONG = 128, 512
YARN = RopeScalingConfig(
    factor=LONG / SHORT, original_max_position_embeddings=SHORT, beta_fast=32, beta_slow=1, mscale=1, mscale_all_dim=1
)
BYTES, SET, ASK, VOCABULARY = 256, 256, 257, 258
TRIPLE = 3  # tokens: SET key value, and ASK key value
PAIRS = 16 / 128  # a token of text
STEP = 2048  # tokens
ROWS = 64  # of text that is measured
MODEL = (
    "num_hidden_layers=2",
    "hidden_size=64",
    "qk_rope_head_dim=16",
    "qk_nope_head_dim=8",
    "intermediate_size=128",
    "moe_intermediate_size=32",
)


def text(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels that ask for the values alone, and how many tokens before each was set: [B, T] each."""
    tokens = torch.randint(BYTES, (rows, length + 1), generator=generator)
    labels, distances = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    pairs = int(length * PAIRS)
    for row in range(rows):
        places = torch.randperm(length // TRIPLE, generator=generator)[: 2 * pairs].view(2, pairs) * TRIPLE
        keys = torch.randperm(BYTES, generator=generator)[:pairs]
        values = torch.randint(BYTES, (pairs,), generator=generator)
        set_at, ask_at = places.sort(0).values
        for marker, at in ((SET, set_at), (ASK, ask_at)):
            tokens[row, at], tokens[row, at + 1], tokens[row, at + 2] = marker, keys, values
        labels[row, ask_at + 2], distances[row, ask_at + 2] = values, ask_at - set_at
    return tokens[:, :-1], labels[:, 1:], distances[:, 1:]


def train(model: Transformer, *, steps: int, length: int, lr: tuple[float, float], seed: int) -> None:
    """Steps of MuonClip, with a learning rate that goes linearly from one to another after 20 steps of warm-up."""
    groups = split_parameters(model.named_parameters(), model.parameter_roles())
    for group in groups:
        group["algorithm"] = "adamw" if group["role"] in ("embedding", "head", "norm") else "muon"
    optimizer = MuonClip(groups, lr=lr[0], weight_decay=0.0, qk_clip=QKClip(model.attention_layers(), tau=100.0))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (lr[0] + (lr[1] - lr[0]) * step / steps) * min(1, (step + 1) / 20)
        tokens, labels, _ = text(STEP // length, length, generator)
        (model(tokens, labels)[0].sum() / (labels >= 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for _, moe in model.moe_layers():
            bias = moe.gate.e_score_correction_bias
            bias.copy_(update_bias(bias, moe.gate.loads, rate=model.config.router_bias_rate))
            moe.gate.loads.zero_()


@torch.no_grad()
def recall(model: Transformer, *, seed: int) -> list[float]:
    """The share of values that are found: in text of SHORT tokens; and of LONG, by the distance in bins of SHORT."""
    found = []
    for length in (SHORT, LONG):
        tokens, labels, distances = text(ROWS, length, torch.Generator().manual_seed(seed))
        right = model.eval().logits(tokens).argmax(-1) == labels
        asked = [(labels >= 0) & (distances // SHORT == number) for number in range(length // SHORT)]
        found += [float(right[chosen].float().mean()) for chosen in asked]
    return found


def contestants(seed: int, *, steps: int) -> Iterator[tuple[str, list[float]]]:
    """What each way of reading LONG tokens finds, of a model that learnt SHORT ones."""
    config = model_config("nano", *(f"model.{setting}" for setting in MODEL), vocabulary=VOCABULARY)
    model, apart = build_model(config, seed=seed), 10**6 + seed  # no text is trained on and measured
    train(model, steps=400, length=32, lr=(0.01, 0.005), seed=3 * seed)
    train(model, steps=300, length=SHORT, lr=(0.005, 0.001), seed=3 * seed + 1)
    yield "as it was trained", recall(model, seed=apart)
    extended, plain = copy.deepcopy(model), model
    extended.set_rope_scaling(YARN)
    yield "YaRN switched on, nothing learnt", recall(extended, seed=apart)
    for name, one in ((f"{steps} steps with YaRN", extended), (f"{steps} steps without", plain)):
        train(one, steps=steps, length=LONG, lr=(0.001, 0.0005), seed=3 * seed + 2)
        yield name, recall(one, seed=apart)


def main() -> None:
    """Prints a Markdown table: means over seeds, and what they lie between."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="of the phase")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [list(contestants(seed, steps=arguments.steps)) for seed in range(arguments.seeds)]
    print(f"{machine()}\n")
    bins = [f"{low} to {low + SHORT}" for low in range(0, LONG, SHORT)]
    print(f"| | in {SHORT} tokens | in {LONG}: {' | '.join(bins)} before |")
    print("| --- " + "| ---: " * (1 + len(bins)) + "|")
    for name, *found in ((rows[0][0], *(row[1] for row in rows)) for rows in zip(*runs, strict=True)):
        cells = [f"{sum(v) / len(v):.1%} ({min(v):.1%} to {max(v):.1%})" for v in zip(*found, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
