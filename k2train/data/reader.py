"""Shards as training reads them: opened when they are first needed, each block checked when it is first touched.

Opening a data set reads no shard, so that it takes as long for ten thousand shards as for one. A byte that is not what
``prepare`` wrote is an error before any token of its block is given out.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from k2train.data.errors import DataError, os_errors_explained
from k2train.data.manifest import BLOCK_BYTES, ShardRecord, map_file
from k2train.data.shards import parse_header, view

PATIENCE = 5.0  # seconds that the end waits for a read in flight; one that hangs is left behind

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # tokens, labels, starts
Item = TypeVar("Item")


class Files(Protocol):
    """Where the files of a data set lie: a folder, or a cache of a remote one.

    Attributes:
        bounded: whether shards come and go; it is told then which are needed.
    """

    bounded: bool

    def shard(self, record: ShardRecord, digests: NDArray[np.uint64]) -> Path:
        """The local file of a shard, fetched if need be."""

    def keep(self, shards: Iterable[tuple[ShardRecord, NDArray[np.uint64]]]) -> None:
        """These are needed now and next."""

    def remedy(self, path: Path) -> str:
        """What to do about a file that is damaged."""


class Folder:
    """A data set in a local folder."""

    bounded = False

    def __init__(self, root: Path) -> None:
        """Reads nothing."""
        self.root = root

    def shard(self, record: ShardRecord, digests: NDArray[np.uint64]) -> Path:
        """The file of a shard."""
        del digests
        path = self.root / record.file
        if not path.is_file():
            raise DataError(f"the shard {path} is missing: {self.remedy(path)}")
        return path

    def keep(self, shards: Iterable[tuple[ShardRecord, NDArray[np.uint64]]]) -> None:
        """All are here in any case."""

    def remedy(self, path: Path) -> str:
        """What to do about a file that is damaged."""
        del path
        return f"delete the folder {self.root} and prepare the data again"


class Shards(Sequence["OpenShard"]):
    """The shards of a split of a source, made when they are asked for: there may be ten thousand."""

    def __init__(self, files: Files, columns: Mapping[str, Sequence[Any]], digests: NDArray[np.uint64]) -> None:
        """Takes what the manifest says of them by column, and the digests of all their blocks."""
        self._files, self._columns, self._digests = files, columns, digests
        self._made: dict[int, OpenShard] = {}
        sizes = np.asarray(columns["size"], dtype=np.int64)
        self._blocks = np.concatenate([[0], np.cumsum(-(-sizes // BLOCK_BYTES))])

    @property
    def tokens(self) -> Sequence[int]:
        """Of each shard."""
        return self._columns["tokens"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> Any:
        """A shard, or a list of them for a slice."""
        if isinstance(index, int) and (made := self._made.get(index)) is not None:
            return made
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number not in self._made:
            record = ShardRecord(**{name: values[number] for name, values in self._columns.items()})
            blocks = self._digests[self._blocks[number] : self._blocks[number + 1]]
            self._made[number] = OpenShard(self._files, record, blocks)
        return self._made[number]

    def close(self, *, apart_from: Container[str]) -> None:
        """Lets go of the files that are open, but for these."""
        for shard in list(self._made.values()):
            if shard.record.file not in apart_from:
                shard.close()


class OpenShard:
    """A shard of the manifest; ``k2train.data.shards.TENSORS`` says what is in it."""

    def __init__(self, files: Files, record: ShardRecord, digests: NDArray[np.uint64]) -> None:
        """Reads nothing.

        Args:
            files: where it lies.
            record: what the manifest says of it.
            digests: of its blocks, as ``open_digests`` has them.
        """
        self.files, self.record, self.digests = files, record, digests

    def __len__(self) -> int:
        return self.record.tokens

    def read(self, first: int, last: int) -> NDArray[Any]:
        """The tokens ``first`` to ``last``, as a view of the mapped file."""
        tokens, offset, size = self._tokens
        self._check(offset + first * size, offset + last * size)
        return tokens[first:last]

    @cached_property
    def document_ends(self) -> NDArray[np.int64]:
        """(D,) where each document ends in the tokens, its end_of_text included."""
        return self._whole("document_ends")

    @cached_property
    def document_ids(self) -> NDArray[np.int64]:
        """(D,) the number of each document in its source."""
        return self._whole("document_ids")

    def origin(self, document: int) -> str:
        """Where document number ``document`` of this shard came from."""
        ends = self._whole("origin_ends")
        start = int(ends[document - 1]) if document else 0
        return self._whole("origins")[start : int(ends[document])].tobytes().decode("utf-8")

    def check(self) -> None:
        """Reads and checks all that has not been checked yet."""
        self._check(0, self.record.size)

    def close(self) -> None:
        """Lets go of the file; it is opened and checked again when it is next read."""
        for name in ("_map", "_checked", "_header", "_tokens", "document_ends", "document_ids"):
            self.__dict__.pop(name, None)

    @cached_property
    def _map(self) -> tuple[Path, Any]:
        path = self.files.shard(self.record, self.digests)
        with os_errors_explained(path):
            size = path.stat().st_size
            if size != self.record.size:
                raise DataError(
                    f"the shard {path} has {size} bytes and its manifest says {self.record.size}: "
                    f"{self.files.remedy(path)}"
                )
            return path, memoryview(map_file(path))

    @cached_property
    def _checked(self) -> bytearray:
        """Of each block 1 if it is known to be what was written."""
        return bytearray(self.record.blocks)

    @cached_property
    def _header(self) -> tuple[dict[str, Any], int]:
        self._check(0, min(self.record.size, 8))
        data = self._map[1]
        length = int.from_bytes(data[:8], "little")
        self._check(0, min(self.record.size, 8 + length))
        return parse_header(data)

    @cached_property
    def _tokens(self) -> tuple[NDArray[Any], int, int]:
        """All tokens, unchecked, at which byte they begin, and the bytes of each."""
        tokens, offset = self._view("tokens")
        return tokens, offset, tokens.itemsize

    def _whole(self, name: str) -> NDArray[Any]:
        array, offset = self._view(name)
        self._check(offset, offset + array.nbytes)
        return array

    def _view(self, name: str) -> tuple[NDArray[Any], int]:
        header, base = self._header
        return view(self._map[1], header, base, name), base + int(header[name]["data_offsets"][0])

    def _check(self, start: int, stop: int) -> None:
        """Raises unless the bytes ``start`` to ``stop`` are those that were written."""
        checked = self._checked
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            if checked[block]:
                continue
            path, data = self._map
            begin, end = block * BLOCK_BYTES, min(self.record.size, (block + 1) * BLOCK_BYTES)
            found, expected = xxhash.xxh3_64_intdigest(data[begin:end]), int(self.digests[block])
            if found != expected:
                raise DataError(
                    f"the shard {path} is damaged in bytes {begin} to {end}: their xxh3 is {found:016x} and was "
                    f"{expected:016x} when it was written: {self.files.remedy(path)}"
                )
            checked[block] = 1


def read_ahead(
    read: Callable[[Item], Batch], plan: Iterable[Sequence[Item]], *, ahead: int, pin: bool
) -> Generator[list[Batch]]:
    """``read`` of each item of each step of the plan, by one thread while the caller computes.

    A step is handed over whole: two threads that take turns at every batch spend more on that than on reading.

    Args:
        read: gives the batch of an item.
        plan: the items of each step; may be endless.
        ahead: steps that are read before they are asked for.
        pin: into page-locked memory, from which a GPU copies while it computes.
    """
    ready: queue.SimpleQueue[list[Batch] | Exception | None] = queue.SimpleQueue()
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True for each step that may be read, False at the end
    for _ in range(ahead):
        wanted.put(True)
    stopped = threading.Event()

    def batches(items: Sequence[Item]) -> Iterator[Batch]:
        for item in items:
            if stopped.is_set():
                return
            tokens, labels, starts = read(item)
            if pin:
                tokens, labels = tokens.contiguous().pin_memory(), labels.contiguous().pin_memory()
                starts = None if starts is None else starts.pin_memory()
            yield tokens, labels, starts

    def work() -> None:
        try:
            for items in plan:
                if not wanted.get() or stopped.is_set():
                    return
                ready.put(list(batches(items)))
            ready.put(None)
        except Exception as error:  # raised again by the caller's thread
            ready.put(error)

    thread = threading.Thread(target=work, name="k2train-prefetch", daemon=True)

    def end() -> None:
        stopped.set()
        wanted.put(False)
        thread.join(PATIENCE)

    atexit.register(end)  # Python kills a thread that is inside torch at its end, and with it the process
    thread.start()
    try:
        while (step := ready.get()) is not None:
            if isinstance(step, Exception):
                raise step
            wanted.put(True)
            yield step
    finally:
        atexit.unregister(end)
        end()
