"""A prepared data set of given documents, without text: what the tests of order, reading and caches read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from k2train.config import DataConfig, parse
from k2train.data import prepare
from k2train.data.manifest import describe_split, read_manifest, write_digests, write_manifest
from k2train.data.shards import find_shard, write_shard
from k2train.paths import config_dir

VOCABULARY = 300


def documents_of(count: int, *, seed: int, longest: int = 60) -> list[np.ndarray]:
    """Documents of up to ``longest`` tokens of random ids, each closed by end_of_text (0)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, size=count)
    return [np.append(rng.integers(1, VOCABULARY, size=n - 1), 0).astype(np.uint32) for n in lengths]


def make_dataset(folder: Path, sources: Mapping[str, Sequence[np.ndarray]], *, per_shard: int = 10) -> Path:
    """The manifest of a data set whose training split is these documents; nothing is held out.

    Args:
        folder: an empty or new one.
        sources: documents by name of the source.
        per_shard: documents of a shard.
    """
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for name in "ab":
        (corpus / f"{name}.txt").write_text(f"text of {name} " * 50)
    values = yaml.safe_load((config_dir() / "data" / "folder.yaml").read_text())
    values |= {"path": str(corpus), "held_out": 0.4}
    values["tokenizer"]["vocab_size"] = VOCABULARY
    path = prepare(parse(DataConfig, values), cache=folder, progress=lambda *_: None)
    manifest, home = read_manifest(path), path.parent
    manifest["sources"] = {}
    for source, documents in sources.items():
        (home / source).mkdir(exist_ok=True)
        records, digests = [], []
        for number, at in enumerate(range(0, len(documents), per_shard)):
            part, name = documents[at : at + per_shard], f"{source}/train-{number:05d}.safetensors"
            write_shard(
                home / name,
                part,
                document_ids=range(at, at + len(part)),
                document_bytes=[len(document) for document in part],
                origins=[f"{source}/{at + i}" for i in range(len(part))],
                vocab_size=VOCABULARY,
                unit="made",
            )
            found = find_shard(home, name, unit="made")
            assert found is not None
            records.append(found[0])
            digests.append(found[1])
        manifest["sources"][source] = {
            "splits": {"train": describe_split(records), "held_out": describe_split([])},
            "digests": write_digests(home, source, {"train": digests, "held_out": []}),
        }
    del manifest["fingerprint"]
    write_manifest(home, manifest)
    return path
