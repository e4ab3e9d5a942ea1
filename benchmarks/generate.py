"""Tokens a second of ``k2train generate`` beside transformers' ``generate`` with its cache, on one exported model.

    python benchmarks/generate.py                                     # model=base with random weights, greedy
    python benchmarks/generate.py --model small --prompt 64 --tokens 200
    python benchmarks/generate.py --threads 2 --batch 8

Both start from the same folder, in fp32, with the same threads, prompts and number of new tokens, and neither may end
early. At least 1.5 times as many tokens a second are asked for. Rounds alternate, and tokens are compared: the last
column counts those in which the two agree (after the first that differs by rounding, the texts are others).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from measure import interleaved, interval

from k2train.checkpoint import Interval, choose_checkpoint, save_checkpoint
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.cli.trained import trained_model
from k2train.comm import World
from k2train.config import RunConfig, parse, to_dict
from k2train.export import ReleasedFolder, Vocabulary, write_folder
from k2train.model import build_model

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def exported(folder: Path, model: str) -> Path:
    """A model of random weights as an export."""
    config = parse(RunConfig, compose(TRAIN, [f"model={model}"]))
    sizes = config.model.vocab_size or 4096
    built = build_model(parse(type(config.model), {**to_dict(config.model), "vocab_size": sizes}), seed=0)
    intervals = [Interval(name, "master", 0, p.detach().flatten()) for name, p in built.named_parameters()]
    there = {i.name for i in intervals}
    intervals += [Interval(n, "buffer", 0, b) for n, b in built.state_dict().items() if n not in there]
    shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    state = {"config": to_dict(config), "vocab_size": sizes}
    save_checkpoint(folder / "run", step=1, intervals=intervals, shapes=shapes, state=state, world=ALONE)
    checkpoint = choose_checkpoint(folder / "run")
    write_folder(
        checkpoint,
        folder / "hf",
        config=trained_model(checkpoint),
        vocabulary=Vocabulary("{}", "", 0),
        card="",
        dtype="fp32",
        shard_bytes=1 << 40,
    )
    return folder / "hf"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="base")
    options.add_argument("--prompt", type=int, default=32, help="tokens")
    options.add_argument("--tokens", type=int, default=128, help="new ones")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rounds", type=int, default=6)
    given = options.parse_args()
    torch.set_num_threads(given.threads)

    with tempfile.TemporaryDirectory() as folder:
        path = exported(Path(folder), given.model)
        defaults = parse(RunConfig, compose(TRAIN, [])).model
        ours = ReleasedFolder(path, defaults=defaults).load_model(torch.device("cpu"), torch.float32)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    vocabulary = ours.head_weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, vocabulary, (given.rounds + 1, given.batch, given.prompt), generator=generator)
    found: dict[str, list[list[int]]] = {"k2train": [], "transformers": []}

    def run_ours(number: int) -> None:
        found["k2train"].append(_greedy(ours, prompts[number].tolist(), given.tokens))

    def run_theirs(number: int) -> None:
        tokens = prompts[number]
        with torch.no_grad():
            out = theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=given.tokens,
                min_new_tokens=given.tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        found["transformers"].append(out[:, given.prompt :].flatten().tolist())

    seconds = interleaved({"k2train": run_ours, "transformers": run_theirs}, rounds=given.rounds)
    number = given.batch * given.tokens
    print(f"{given.model}, batch {given.batch}, {given.prompt} + {given.tokens} tokens, {given.threads} threads, fp32")
    for name, values in seconds.items():
        median, low, high = interval([number / value for value in values])
        print(f"  {name:<14}{median:8.1f} tokens a second ({low:.1f} to {high:.1f})")
    ratio, low, high = interval([b / a for a, b in zip(*seconds.values(), strict=True)])
    same = [a == b for pair in zip(*found.values(), strict=True) for a, b in zip(*pair, strict=True)]
    print(
        f"  ratio {ratio:.2f} ({low:.2f} to {high:.2f}), at least 1.5 wanted; {sum(same)} of {len(same)} tokens agree"
    )


def _greedy(model: torch.nn.Module, prompts: list[list[int]], tokens: int) -> list[int]:
    """Always the likeliest token, and never an end."""
    from k2train.generate import Remembering

    scores = Remembering(model, max_tokens=tokens)
    chosen = [scores.begin(prompts).argmax(-1).tolist()]
    while len(chosen) < tokens:
        chosen.append(scores.step(chosen[-1]).argmax(-1).tolist())
    return [token for row in zip(*chosen, strict=True) for token in row]


if __name__ == "__main__":
    main()
