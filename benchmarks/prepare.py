"""Bytes per CPU-second of `k2train prepare`, beside the bare loop that encodes and beside `datasets.map`.

    python benchmarks/prepare.py [--megabytes 120] [--rounds 3] [--vocabulary 32768]

The text is the source code of this Python's packages, as JSON lines, a document each file. All contestants use the same
tokenizer.json and run in processes of their own, interleaved:

- ``bare loop``: tiktoken with the same merges on texts that are in memory, ids thrown away;
- ``k2train prepare``: all of it, from files to a finished data set: read twice, digests, split, encode, write, hash;
- ``datasets.map``: load_dataset and map with `tokenizers`, batched, from files to Arrow files.

CPU-seconds are those of the process and its children, without imports. A ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

CONTESTANTS = ("bare loop", "k2train prepare", "datasets.map")


def texts(limit: int) -> Iterator[str]:
    size = 0
    for key in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(key)).rglob("*.py")):
            if "\0" in (text := path.read_text(encoding="utf-8", errors="ignore")) or not text:
                continue
            if size >= limit:
                return
            size += len(text.encode())
            yield text


def cpu() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in (own, children))


def bare_loop(folder: Path) -> Callable[[], None]:
    from k2train.data.tokenizer import Tokenizer

    documents = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer((folder / "tokenizer.json").read_text(), engine="tiktoken")

    def run() -> None:
        for text in documents:
            tokenizer.encode_array(text)

    return run


def k2train_prepare(folder: Path) -> Callable[[], None]:
    import yaml

    from k2train.config import DataConfig, parse
    from k2train.data import prepare
    from k2train.paths import config_dir

    values = yaml.safe_load((config_dir() / "data" / "jsonl.yaml").read_text())
    values |= {"path": str(folder / "text.jsonl"), "workers": 1}
    values["tokenizer"] |= {"kind": "json", "path": str(folder / "tokenizer.json")}
    config = parse(DataConfig, values)
    return lambda: print(prepare(config, cache=folder / "cache", progress=lambda *_: None), file=sys.stderr)


def datasets_map(folder: Path) -> Callable[[], None]:
    os.environ["HF_HOME"] = str(folder / "cache")
    import datasets
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    datasets.disable_progress_bars()

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [encoding.ids for encoding in tokenizer.encode_batch(batch["text"])]}

    def run() -> None:
        loaded = datasets.load_dataset("json", data_files=str(folder / "text.jsonl"), split="train")
        loaded.map(encode, batched=True, remove_columns=["text"])

    return run


def measure(name: str, folder: Path) -> float:
    """CPU-seconds of a contestant, in a process of its own with a cache of its own."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    command = [sys.executable, __file__, "--contestant", name, "--folder", str(folder)]
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def compete(arguments: argparse.Namespace, folder: Path) -> None:
    from k2train.data.tokenizer import train_bpe

    documents = list(texts(int(arguments.megabytes * 1e6)))
    size = sum(len(text.encode()) for text in documents)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    sample = documents[:: max(1, size // 8_000_000)]
    (folder / "tokenizer.json").write_text(train_bpe(sample, vocab_size=arguments.vocabulary))
    print(f"{len(documents)} documents of {size / 1e6:.1f} MB, {arguments.vocabulary} tokens in the vocabulary")
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(arguments.rounds):
        for name in CONTESTANTS:
            seconds[name].append(measure(name, folder))
    own = seconds["k2train prepare"]
    for name, measured in seconds.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(measured, own, strict=True))
        rate = size / 1e6 / statistics.median(measured)
        print(f"{name:16}  {rate:6.2f} MB a CPU-second; prepare is {ratio:5.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        makers = dict(zip(CONTESTANTS, (bare_loop, k2train_prepare, datasets_map), strict=True))
        run = makers[arguments.contestant](arguments.folder)
        begin = cpu()
        run()
        print(cpu() - begin)
        return
    with tempfile.TemporaryDirectory() as folder:
        compete(arguments, Path(folder))


if __name__ == "__main__":
    main()
