"""Whether the data of a run is there, the same for all ranks, and whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from k2train.comm import World, gather_json
from k2train.config import DataConfig
from k2train.data import DataError, Dataset, find_dataset, find_prepared, open_dataset
from k2train.data.reader import Folder

SAMPLED = 8  # shards of which a rank holds a block against its digest


@dataclass(frozen=True)
class Data:
    """What one rank found."""

    fault: str | None = None
    fingerprint: str | None = None  # None: it has not been prepared
    tokens: int = 0  # of training
    shards: int = 0
    sampled: int = 0


def look(config: DataConfig, *, cache: Path, world: World) -> list[Data]:
    """What all ranks found; called by all of them together."""
    found, manifest = Data(), None
    if world.main:
        try:
            manifest = _find(config, cache)
        except DataError as error:
            found = Data(fault=str(error))
    (path, *_) = gather_json(None if manifest is None else str(manifest))
    if path is not None:
        try:
            found = _check(open_dataset(Path(path)), world)
        except DataError as error:
            found = Data(fault=str(error))
    return [Data(**each) for each in gather_json(asdict(found))]


def _find(config: DataConfig, cache: Path) -> Path | None:
    if config.prepared:
        return find_dataset(config.prepared, cache=cache, limit=config.cache_bytes)
    return find_prepared(config, cache=cache)


def _check(dataset: Dataset, world: World) -> Data:
    """The sizes of this rank's share of the shards, and blocks of some of them.

    Raises:
        DataError: a shard is missing, or is not what was prepared.
    """
    shards = dataset.stream("train").shards
    own = list(range(world.rank, len(shards), world.size))
    if isinstance(dataset.files, Folder):
        for number in own:
            record = shards[number].record
            path = dataset.folder / record.file
            if not path.is_file() or path.stat().st_size != record.size:
                raise DataError(f"the shard {path} is missing or not of {record.size} bytes: prepare the data again")
    sampled = own[:: max(1, len(own) // SAMPLED)][:SAMPLED] if isinstance(dataset.files, Folder) else own[:1]
    for number in sampled:
        shards[number].read(0, 1)  # checks the block that holds it
    return Data(None, dataset.fingerprint, dataset.tokens("train"), len(shards), len(sampled))
