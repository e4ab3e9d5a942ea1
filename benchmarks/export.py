"""What export and import cost, beside plainly copying as many bytes while hashing them.

    python benchmarks/export.py                     # 512 MiB of masters in the system's temporary folder
    python benchmarks/export.py --mib 4096 --folder /scratch

Bandwidth of each over that of the copy, medians over the rounds, at least 0.6 wanted. The copy reads, hashes
(xxh3-128), writes and syncs the bytes that the export (or the import) writes, so that the disk counts for both. What is
compared alternates.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash

from k2train.checkpoint import Interval, choose_checkpoint, save_checkpoint
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.cli.trained import trained_model
from k2train.comm import World
from k2train.config import ModelConfig, RunConfig, parse, to_dict
from k2train.export import ReleasedFolder, Vocabulary, write_folder, write_start
from k2train.model import build_model

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
CHUNK = 1 << 24


def copy(source: Path, target: Path) -> int:
    """Copies files with a hash of what is read, and syncs. Returns bytes."""
    size = 0
    target.mkdir()
    for path in sorted(source.rglob("*.safetensors")):
        digest = xxhash.xxh3_128()
        with open(path, "rb") as file, open(target / path.name, "wb") as out:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                out.write(chunk)
                size += len(chunk)
            out.flush()
            os.fsync(out.fileno())
    return size


def bandwidth(work: Callable[[Path], int], folder: Path) -> float:
    """Bytes a second of ``work``, which makes the folder."""
    begin = time.perf_counter()
    size = work(folder)
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder)
    return size / seconds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mib", type=int, default=512)
    options.add_argument("--folder", type=Path)
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    torch.set_num_threads(1)
    usual = parse(RunConfig, compose(TRAIN, ["model=base", "name=back"]))
    experts = max(8, given.mib * 2**20 // (3 * 4 * 1024 * 512 * 2))
    model: ModelConfig = dataclasses.replace(
        usual.model,
        vocab_size=4096,
        hidden_size=1024,
        num_hidden_layers=3,
        moe_intermediate_size=512,
        n_routed_experts=experts,
    )
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        built = build_model(model, seed=0)
        intervals = [Interval(n, "master", 0, p.detach().flatten()) for n, p in built.named_parameters()]
        there = {i.name for i in intervals}
        intervals += [Interval(n, "buffer", 0, b) for n, b in built.state_dict().items() if n not in there]
        shapes = {n: tuple(t.shape) for n, t in built.state_dict().items()}
        state = {"config": to_dict(dataclasses.replace(usual, model=model)), "vocab_size": 4096}
        save_checkpoint(folder / "run", step=1, intervals=intervals, shapes=shapes, state=state, world=ALONE)
        del built, intervals
        checkpoint = choose_checkpoint(folder / "run")

        def export(dtype: str) -> Callable[[Path], int]:
            return lambda out: write_folder(
                checkpoint,
                out,
                config=trained_model(checkpoint),
                vocabulary=Vocabulary("{}", "", 0),
                card="",
                dtype=dtype,
                shard_bytes=5_000_000_000,
            )

        def back(source: Path) -> Callable[[Path], int]:
            def work(out: Path) -> int:
                released = ReleasedFolder(source, defaults=usual.model)
                config = dataclasses.replace(usual, runs_dir=str(out), model=released.config)
                written = write_start(released, "{}", config=config, world=ALONE)
                return choose_checkpoint(written).size

            return work

        for dtype in ("fp32", "bf16"):
            export(dtype)(folder / dtype)
        contestants = {
            "export fp32": (export("fp32"), folder / "fp32"),
            "export bf16": (export("bf16"), folder / "bf16"),
            "import fp32": (back(folder / "fp32"), folder / "run"),
            "import bf16": (back(folder / "bf16"), folder / "run"),
        }
        for what, (work, alike) in contestants.items():
            ratios, rates = [], []
            for number in range(given.rounds + 1):
                ours = bandwidth(work, folder / "out")
                plain = bandwidth(lambda out, source=alike: copy(source, out), folder / "copy")
                if number:
                    ratios.append(ours / plain)
                    rates.append((ours, plain))
            ours, plain = (statistics.median(column) / 2**20 for column in zip(*rates, strict=True))
            print(f"{what}: {statistics.median(ratios):.2f} of a copy ({ours:.0f} and {plain:.0f} MiB/s)", flush=True)


if __name__ == "__main__":
    main()
