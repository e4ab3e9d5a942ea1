"""Tokens per CPU-second of the data pipeline beside other readers, on tokens made for it.

    python benchmarks/data_pipeline.py [--tokens 100e6] [--rounds 5] [--only k2train,raw]

Three sources of weights 6, 3, 1 are read in shuffled order as batches of [8, 2049] int64 tokens; every contestant reads
its own file of the same tokens, page cache warm, interleaved; each in a process of its own, as the threads that some
keep running would be charged to the others:

- ``raw``: a loop over one shuffled memory map, the most that can be had;
- ``k2train``: the order, the mixture and the digests of this project, prefetch thread on, four batches a step;
- ``k2train packed``: best-fit packed, with the boundaries of documents;
- ``indexed``: as Megatron-LM reads: an index of documents, a shuffled index of samples, three blended sets;
- ``mosaicml-streaming``: MDS files, one stream a source with its proportion, if the package is installed.

Then what a person waits for: the first batch after imports, opening a data set of 10,000 shards and 10^12 tokens (a
manifest without the shards), and finding sample 10^9.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

BATCH, LENGTH = 8, 2048
WEIGHTS = {"code": 6.0, "math": 1.0, "web": 3.0}
VOCAB = 32768


def make_tokens(count: int, seed: int) -> list[np.ndarray]:
    """Documents of log-normal length, about 600 tokens in the median."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(2, rng.lognormal(6.4, 1.2, size=max(1, count // 1200)).astype(int))
    return [np.append(rng.integers(1, VOCAB, size=n - 1, dtype=np.uint32), np.uint32(0)) for n in lengths]


def make_dataset(folder: Path, documents: dict[str, list[np.ndarray]]) -> Path:
    """A prepared data set of these tokens; the tokenizer is that of a small corpus, and decodes nothing."""
    import yaml

    from k2train.config import DataConfig, parse
    from k2train.data import prepare
    from k2train.data.manifest import (
        describe_split,
        read_manifest,
        write_digests,
        write_manifest,
    )
    from k2train.data.shards import find_shard, write_shard
    from k2train.paths import config_dir

    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for name in "ab":
        (corpus / f"{name}.txt").write_text(f"text of {name} " * 50)
    values = yaml.safe_load((config_dir() / "data" / "folder.yaml").read_text())
    values |= {"path": str(corpus), "held_out": 0.4}
    values["tokenizer"]["vocab_size"] = 300
    path = prepare(parse(DataConfig, values), cache=folder, progress=lambda *_: None)
    manifest, home = read_manifest(path), path.parent
    manifest["sources"] = {}
    for source, texts in documents.items():
        (home / source).mkdir()
        records, digests = {"train": [], "held_out": []}, {"train": [], "held_out": []}
        for number, at in enumerate(range(0, len(texts), 8000)):
            part, name = texts[at : at + 8000], f"{source}/train-{number:05d}.safetensors"
            write_shard(
                home / name,
                part,
                document_ids=range(at, at + len(part)),
                document_bytes=[len(text) for text in part],
                origins=[f"{source}/{at + i}" for i in range(len(part))],
                vocab_size=VOCAB,
                unit="made",
            )
            record, found = find_shard(home, name, unit="made")
            records["train"].append(record)
            digests["train"].append(found)
        manifest["sources"][source] = {
            "splits": {split: describe_split(records[split]) for split in records},
            "digests": write_digests(home, source, digests),
        }
    del manifest["fingerprint"]
    write_manifest(home, manifest)
    return path


# ---- contestants: each gives batches for ever


def raw(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """One memory map, windows in shuffled order."""
    order = np.random.default_rng(0).permutation((len(tokens) - 1) // LENGTH)
    while True:
        for first in range(0, len(order) - BATCH + 1, BATCH):
            starts = order[first : first + BATCH] * LENGTH
            yield np.stack([tokens[start : start + LENGTH + 1].astype(np.int64) for start in starts])


def ours(path: Path, *, packing: bool, boundaries: bool) -> Iterator[object]:
    """This project's stream, read by its thread."""
    from k2train.data import DataPhase, TrainStream, open_dataset

    phase = DataPhase(10**9, LENGTH, WEIGHTS)
    stream = TrainStream(open_dataset(path), [phase], seed=0, packing=packing, boundaries=boundaries)
    numbers = (range(n, n + BATCH) for n in range(0, 10**9, BATCH))
    return chain.from_iterable(stream.steps(zip(*[numbers] * 4, strict=False)))


def indexed(tokens: dict[str, np.ndarray], documents: dict[str, list[np.ndarray]]) -> Iterator[np.ndarray]:
    """Documents in shuffled order back to back, samples by an index of (document, offset), sets blended by an index.

    The idea of Megatron-LM's GPTDataset and BlendedDataset, written anew.
    """
    sets = {name: _indexed_set(tokens[name], [len(text) for text in documents[name]]) for name in tokens}
    total = sum(WEIGHTS.values())
    names = sorted(tokens)
    due, blend = dict.fromkeys(names, 0.0), []
    for n in range(200_000):
        name = max(names, key=lambda name: WEIGHTS[name] / total * (n + 1) - due[name])
        blend.append((name, int(due[name])))
        due[name] += 1
    while True:
        for first in range(0, len(blend) - BATCH + 1, BATCH):
            yield np.stack([sets[name](number) for name, number in blend[first : first + BATCH]])


def _indexed_set(tokens: np.ndarray, lengths: list[int]) -> Callable[[int], np.ndarray]:
    rng = np.random.default_rng(1)
    sizes = np.array(lengths)
    begins = np.cumsum(sizes) - sizes
    order = rng.permutation(len(sizes))
    ends = np.cumsum(sizes[order])
    samples = (int(ends[-1]) - 1) // LENGTH
    firsts = np.searchsorted(ends, np.arange(samples + 1) * LENGTH, side="right")
    offsets = np.arange(samples + 1) * LENGTH - np.where(firsts > 0, ends[firsts - 1], 0)
    shuffled = rng.permutation(samples)

    def get(number: int) -> np.ndarray:
        sample = shuffled[number % samples]
        document, offset, parts, wanted = int(firsts[sample]), int(offsets[sample]), [], LENGTH + 1
        while wanted and document < len(order):
            which = order[document]
            piece = tokens[begins[which] + offset : begins[which] + min(sizes[which], offset + wanted)]
            parts.append(piece)
            wanted -= len(piece)
            document, offset = document + 1, 0
        return np.concatenate(parts).astype(np.int64)

    return get


def mosaic(folder: Path, tokens: dict[str, np.ndarray]) -> Iterator[object]:
    """mosaicml-streaming with its defaults, batched."""
    from streaming import MDSWriter, Stream, StreamingDataset
    from torch.utils.data import DataLoader

    for name, stream in tokens.items():
        with MDSWriter(out=str(folder / name), columns={"tokens": "ndarray:uint16"}) as writer:
            for start in range(0, len(stream) - LENGTH, LENGTH):
                writer.write({"tokens": np.asarray(stream[start : start + LENGTH + 1])})
    streams = [Stream(local=str(folder / name), proportion=WEIGHTS[name] / sum(WEIGHTS.values())) for name in tokens]
    dataset = StreamingDataset(streams=streams, shuffle=True, batch_size=BATCH)
    while True:
        yield from DataLoader(dataset, batch_size=BATCH, collate_fn=_collate)


def _collate(samples: list[dict]) -> np.ndarray:
    return np.stack([sample["tokens"].astype(np.int64) for sample in samples])


def measure(
    contestants: dict[str, Callable[[], Iterator[object]]], *, batches: int, rounds: int
) -> dict[str, list[float]]:
    """Tokens per CPU-second of the contestant's process, all threads, of each round."""
    context = multiprocessing.get_context("fork")
    pipes, processes = {}, []
    for name, make in contestants.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_contest, args=(make, theirs)))
        processes[-1].start()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        names = list(contestants)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            pipes[name].send(batches)
            found[name].append(batches * BATCH * LENGTH / pipes[name].recv())
    for name, process in zip(pipes, processes, strict=True):
        pipes[name].send(0)
        process.join()
    return found


def _contest(make: Callable[[], Iterator[object]], pipe: Connection) -> None:
    """CPU-seconds for as many batches as it is asked for, again and again."""
    batches = make()
    for _ in range(8):  # opens files, starts threads
        next(batches)
    while count := pipe.recv():
        begin = time.process_time()
        for _ in range(count):
            next(batches)
        pipe.send(time.process_time() - begin)


# ---- what a person waits for

FIRST = """
import sys, time, resource
from pathlib import Path
from k2train.data import DataPhase, TrainStream, open_dataset
def private():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Private_")) * 1024
path, number, read = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "read"
before, begin = private(), time.perf_counter()
dataset = open_dataset(path)
stream = TrainStream(dataset, [DataPhase(2 * 10**9, 2048, {name: 1.0 + i for i, name in enumerate(dataset.sources)})],
                     seed=0)
if read:
    stream.batch(range(number, number + 8))
else:
    stream.tokens_seen(number), stream.samples.find(number)
opened = time.perf_counter() - begin
begin = time.perf_counter()
stream.samples.find(10**9)
print(opened, private() - before, time.perf_counter() - begin)
"""


def waits(path: Path, *, read: bool) -> tuple[float, float, float]:
    """Seconds to the first batch after imports, private bytes it took, seconds to find sample 10^9."""
    words = [sys.executable, "-c", FIRST, str(path), "0", "read" if read else "find"]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    seconds, size, seek = map(float, out.split())
    return seconds, size, seek


def huge_manifest(path: Path) -> Path:
    """The manifest of a data set of three sources, 10,000 shards and 10^12 tokens; there are no shards behind it."""
    from k2train.data.manifest import (
        BLOCK_BYTES,
        ShardRecord,
        describe_split,
        read_manifest,
        write_digests,
        write_manifest,
    )

    manifest, home = read_manifest(path), path.parent.parent / "huge"
    home.mkdir(exist_ok=True)
    (home / manifest["tokenizer"]["file"]).write_bytes((path.parent / manifest["tokenizer"]["file"]).read_bytes())
    manifest["sources"] = {}
    rng = np.random.default_rng(0)
    for source, shards in {"code": 5000, "math": 1000, "web": 4000}.items():
        (home / source).mkdir(exist_ok=True)
        size = 200 << 20
        records = [
            ShardRecord(f"{source}/train-{n:05d}.safetensors", size, f"{rng.bytes(32).hex()}", 10**8, 10**5, 4 * 10**8)
            for n in range(shards)
        ]
        blocks = [rng.integers(0, 2**63, size=size // BLOCK_BYTES, dtype=np.uint64) for _ in range(shards)]
        manifest["sources"][source] = {
            "splits": {"train": describe_split(records), "held_out": describe_split([])},
            "digests": write_digests(home, source, {"train": blocks, "held_out": []}),
        }
    del manifest["fingerprint"]
    write_manifest(home, manifest)
    return home / path.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=100e6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--only", help="contestants, separated by commas")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="data-pipeline-") as place:
        folder = Path(place)
        share = {name: weight / sum(WEIGHTS.values()) for name, weight in WEIGHTS.items()}
        documents = {name: make_tokens(int(arguments.tokens * share[name]), seed) for seed, name in enumerate(WEIGHTS)}
        tokens = {}
        for name, texts in documents.items():
            np.concatenate(texts).astype(np.uint16).tofile(folder / f"{name}.bin")
            tokens[name] = np.memmap(folder / f"{name}.bin", np.uint16, "r")
        np.concatenate([tokens[name] for name in tokens]).tofile(folder / "all.bin")
        path = make_dataset(folder / "made", documents)
        contestants: dict[str, Callable[[], Iterator[object]]] = {
            "raw": lambda: raw(np.memmap(folder / "all.bin", np.uint16, "r")),
            "k2train": lambda: ours(path, packing=False, boundaries=False),
            "k2train with boundaries": lambda: ours(path, packing=False, boundaries=True),
            "k2train packed": lambda: ours(path, packing=True, boundaries=True),
            "indexed": lambda: indexed(tokens, documents),
        }
        if importlib.util.find_spec("streaming"):
            contestants["mosaicml-streaming"] = lambda: mosaic(folder / "mosaic", tokens)
        chosen = arguments.only.split(",") if arguments.only else list(contestants)
        found = measure(
            {name: make for name, make in contestants.items() if name in chosen},
            batches=arguments.batches,
            rounds=arguments.rounds,
        )
        print(f"{sum(map(len, tokens.values())):,} tokens, [{BATCH}, {LENGTH + 1}], tokens per CPU-second")
        for name, values in found.items():
            ratio = f"{statistics.median(values) / statistics.median(found['raw']):.2f}" if "raw" in found else "-"
            print(f"{name:24s} {statistics.median(values) / 1e6:8.1f} M   x raw {ratio}")
        for name, (where, read) in {"first batch": (path, True), "10,000 shards": (huge_manifest(path), False)}.items():
            trials = [waits(where, read=read) for _ in range(5)]
            seconds, size, seek = (statistics.median(values) for values in zip(*trials, strict=True))
            print(f"{name}: {seconds:.3f} s after imports, {size / 1e6:.0f} MB private, sample 10^9 in {seek:.4f} s")


if __name__ == "__main__":
    main()
