"""What saving and loading cost, beside plainly copying, writing and reading the same bytes.

    python benchmarks/checkpoint.py                     # 512 MiB of state in the system's temporary folder
    python benchmarks/checkpoint.py --mib 4096 --folder /scratch
    python benchmarks/checkpoint.py --ranks 1024        # the tables of 1000 parameters cut over 1024 ranks

Three ratios, medians over the repetitions. ``held``: how long an asynchronous save holds the step, over a memcpy of the
state; at most 1.5. ``save``: bandwidth of a whole save over plainly writing the same bytes with the same hash and
fsync; at least 0.7. ``load``: of checking all hashes and reading all tensors, over plainly reading and hashing the
bytes of the files; at least 0.7. What is compared alternates, so that a disk or a neighbour that changes its pace hits
both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xxhash

from k2train.checkpoint import HostCopy, Interval, newest_checkpoint, prune, save_checkpoint
from k2train.checkpoint.intervals import SEGMENTS, IntervalReader, read_segments
from k2train.checkpoint.manifest import Manifest
from k2train.checkpoint.safetensors_file import write_safetensors
from k2train.comm import World

CHUNK = 1 << 24
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def state_of(mib: int) -> list[Interval]:
    """Masters and momenta as a rank holds them: a flat tensor of each, cut into parameters of 1 to 16 MiB."""
    numel, generator = mib << 17, np.random.default_rng(0)
    flats = {
        key: torch.from_numpy(generator.standard_normal(numel, dtype=np.float32)) for key in ("master", "momentum")
    }
    found: list[Interval] = []
    start = number = 0
    while start < numel:
        stop = min(numel, start + (1 << 18 << number % 5))
        found += [Interval(f"layers.{number}.weight", key, 0, flat[start:stop]) for key, flat in flats.items()]
        start, number = stop, number + 1
    return found


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def plain_write(path: Path, intervals: list[Interval]) -> None:
    digest = xxhash.xxh3_128()
    with open(path, "wb", buffering=0) as file:
        for interval in intervals:
            view = interval.values.numpy().view(np.uint8).data
            for start in range(0, len(view), CHUNK):
                file.write(view[start : start + CHUNK])
                digest.update(view[start : start + CHUNK])
        os.fsync(file.fileno())


def plain_read(path: Path, out: np.ndarray) -> None:
    digest, view, position = xxhash.xxh3_128(), out.data, 0
    with open(path, "rb", buffering=0) as file:
        while length := file.readinto(view[position : position + CHUNK]):
            digest.update(view[position : position + length])
            position += length


def tables(ranks: int, parameters: int = 1000) -> None:
    """Sizes and times of what says where things are, for files that consist of their headers alone."""
    part = 1 << 14  # elements of each parameter on each rank
    with tempfile.TemporaryDirectory() as name:
        folder, names = Path(name), [f"rank-{rank:05d}.safetensors" for rank in range(ranks)]
        for rank, file in enumerate(names):
            header = {
                f"layers.{number}.mlp.weight/{key}/{rank * part}": {
                    "dtype": "F32",
                    "shape": [part],
                    "data_offsets": [0, 0],
                }
                for number in range(parameters)
                for key in ("master", "momentum")
            }
            text = json.dumps(header, separators=(",", ":")).encode()
            (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
        begin = time.perf_counter()
        records, segments = read_segments(folder, names, {})
        joined = time.perf_counter()
        files = {SEGMENTS: write_safetensors(folder / SEGMENTS, segments)}
        text = Manifest(1, files, records, {}).to_json()
        written = time.perf_counter()
        manifest = Manifest.from_json(text)
        reader = IntervalReader(folder, manifest)
        found = sum(len(reader.segments(tensor)) for tensor in manifest.tensors)
        read = time.perf_counter()
        assert found == ranks * parameters * 2
    print(f"{found} segments of {len(records)} tensors in {ranks} files")
    print(
        f"  rank 0 joins the headers in {joined - begin:.1f} s, writes tables and manifest in {written - joined:.1f} s"
    )
    print(f"  tables {files[SEGMENTS].size / 2**20:.1f} MiB, manifest {len(text) / 2**10:.0f} KiB")
    print(f"  a reader opens them and sees every table in {read - written:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="size of the state")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--ranks", type=int, help="measure the tables of so many instead")
    arguments = parser.parse_args()
    if arguments.ranks:
        tables(arguments.ranks)
        return
    torch.set_num_threads(1)
    intervals = state_of(arguments.mib)
    total = sum(i.values.nbytes for i in intervals)
    shapes = {i.name: (len(i.values),) for i in intervals}
    source = np.concatenate([i.values.numpy() for i in intervals]).view(np.uint8)
    target, copy = np.zeros_like(source), HostCopy()
    outs = {i.tensor: torch.zeros_like(i.values) for i in intervals}
    first = seconds(lambda: copy.take(intervals))
    times: dict[str, list[float]] = {}

    def note(name: str, work: Callable[[], object]) -> None:
        times.setdefault(name, []).append(seconds(work))

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, plain = Path(name) / "checkpoints", Path(name) / "plain"

        def save() -> None:
            save_checkpoint(folder, step=len(times["save"]), intervals=intervals, shapes=shapes, state={}, world=ALONE)

        def load() -> None:
            checkpoint = newest_checkpoint(folder, world=ALONE, say=print)
            assert checkpoint is not None
            for interval in intervals:
                checkpoint.reader.fill(interval.name, interval.key, 0, outs[interval.tensor])

        times["save"] = []
        for _ in range(arguments.repeat):
            note("memcpy", lambda: np.copyto(target, source))
            note("held", lambda: copy.take(intervals))
            note("plain write", lambda: plain_write(plain, intervals))
            note("save", save)
            note("plain read", lambda: plain_read(plain, target))
            note("load", load)
            prune(folder, keep=1)
        assert all(torch.equal(outs[i.tensor], i.values) for i in intervals)
    typical = {name: statistics.median(values) for name, values in times.items()}
    print(f"{total / 2**20:.0f} MiB in {len(intervals)} tensors, {arguments.repeat} repetitions; GB/s (median)")
    for name, value in typical.items():
        print(f"  {name:<12} {total / value / 1e9:6.2f}")
    print(f"  first copy   {total / first / 1e9:6.2f}  (its memory is mapped then)")
    held = typical["held"] / typical["memcpy"]
    save, load = typical["plain write"] / typical["save"], typical["plain read"] / typical["load"]
    print(f"held {held:.2f} of a memcpy (bar: at most 1.5)")
    print(f"save {save:.2f}, load {load:.2f} of the plain bandwidth (bar: at least 0.7)")


if __name__ == "__main__":
    main()
