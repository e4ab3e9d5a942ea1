"""A data set that lies elsewhere (s3, gs, http, hf: whatever fsspec opens), and the part of it that is kept here.

``fetch_dataset`` copies the small files (manifest, tokenizer, digests) into a folder and notes the address there; a
folder with that note is opened like any other, and its shards are fetched when they are first read. A shard is fetched
once on a node: under a lock, into a ``.partial`` file that an interrupted fetch goes on with, each block against its
digest, and renamed when it is whole.

The cache is bounded: shards that were not used for longest go first, and never those that are needed now or next.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from k2train.data.errors import DataError, os_errors_explained
from k2train.data.manifest import BLOCK_BYTES, MANIFEST_NAME, ShardRecord, read_manifest
from k2train.lock import held_alone, is_held
from k2train.paths import atomic_write, sync_directory

REMOTE_NAME = "remote.json"  # in the folder of a cached data set: its address, and how much may be kept
ATTEMPTS, FIRST_WAIT = 6, 0.5  # tries of one fetch; seconds before the second one, doubled each time
PATIENCE = 1800.0  # seconds that one process waits for another to fetch the same file
BUSY = "has been fetching this for half an hour; stop it if it hangs, and start the same command again"
# Errors of the local file system, which another try does not mend.
_LOCAL = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
Result = TypeVar("Result")


def find_dataset(address: str, *, cache: Path, limit: int | None) -> Path:
    """The manifest of a data set that was prepared elsewhere, in a folder or behind a URL; see ``fetch_dataset``."""
    if "://" in address:
        return fetch_dataset(address, cache=cache, limit=limit)
    path = Path(address).expanduser()
    return path if path.name == MANIFEST_NAME else path / MANIFEST_NAME


def fetch_dataset(url: str, *, cache: Path, limit: int | None) -> Path:
    """Copies all of a remote data set but its shards, and returns the manifest's path.

    Args:
        url: of its folder, or of the manifest in it.
        cache: the folder in which data sets are kept.
        limit: bytes of its shards that may be kept here; None: all.

    Raises:
        DataError: it cannot be reached, is not what its manifest says, or the cache cannot be written.
    """
    base = url.removesuffix("/").removesuffix("/" + MANIFEST_NAME)
    folder = cache / "remote" / f"{base.rsplit('/', 1)[-1]}-{hashlib.sha256(base.encode()).hexdigest()[:12]}"
    path = folder / MANIFEST_NAME
    with os_errors_explained(folder):
        note = json.dumps({"url": base, "limit": limit})
        if path.is_file() and (folder / REMOTE_NAME).read_text() == note:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with held_alone(folder / "lock", patience=PATIENCE, busy=BUSY):
            if not path.is_file():
                content = _patiently(f"{base}/{MANIFEST_NAME}", lambda: _read_whole(f"{base}/{MANIFEST_NAME}"))
                aside = folder / f"{MANIFEST_NAME}.partial"
                atomic_write(aside, content)
                manifest = read_manifest(aside)
                for described in (
                    manifest["tokenizer"],
                    *(source["digests"] for source in manifest["sources"].values()),
                ):
                    _fetch_small(base, folder, described)
                os.replace(aside, path)
            atomic_write(folder / REMOTE_NAME, note)
    return path


class CachedFolder:
    """The local part of a remote data set; see ``k2train.data.reader.Files``."""

    bounded = True

    def __init__(self, root: Path) -> None:
        """Reads the note of ``fetch_dataset``."""
        note = json.loads((root / REMOTE_NAME).read_text())
        self.root, self._url, self._limit = root, str(note["url"]), note["limit"]
        self._needed: frozenset[str] = frozenset()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="k2train-fetch")

    def shard(self, record: ShardRecord, digests: NDArray[np.uint64]) -> Path:
        """The local file of a shard, fetched if need be."""
        path = self.root / record.file
        with os_errors_explained(path):
            if not self._is_whole(path, record):
                path.parent.mkdir(parents=True, exist_ok=True)
                with held_alone(path.with_name(path.name + ".lock"), patience=PATIENCE, busy=BUSY):
                    if not self._is_whole(path, record):
                        partial = path.with_name(path.name + ".partial")
                        self._make_room(partial, record)
                        self._fetch(path, partial, record, digests)
            with suppress(OSError):  # of a cache that may only be read
                os.utime(path)  # when it was last needed
        return path

    def remedy(self, path: Path) -> str:
        """What to do about a file that is damaged."""
        return f"delete {path}, and it is fetched again from {self._url}"

    def keep(self, shards: Iterable[tuple[ShardRecord, NDArray[np.uint64]]]) -> None:
        """These are needed now and next: they are not dropped, and fetched ahead."""
        wanted = list(shards)
        self._needed = frozenset(record.file for record, _ in wanted)
        for record, digests in wanted:
            self._ahead.submit(self.shard, record, digests)

    def _is_whole(self, path: Path, record: ShardRecord) -> bool:
        return path.is_file() and path.stat().st_size == record.size

    def _make_room(self, partial: Path, record: ShardRecord) -> None:
        """Drops shards until this one fits, and takes the place by giving the partial file its full size."""
        if self._limit is None:
            return
        with held_alone(self.root / "room.lock", patience=PATIENCE, busy=BUSY):
            held, arriving = {}, 0
            # Those that arrive come first: one that is renamed meanwhile is found as a shard, not overlooked.
            for path in (*self.root.glob("*/*-*.safetensors.partial"), *self.root.glob("*/*-*.safetensors")):
                with suppress(FileNotFoundError):
                    held[path] = path.stat()
            held.pop(partial, None)
            total = sum(status.st_size for status in held.values()) + record.size
            for path in sorted(held, key=lambda path: held[path].st_mtime):
                if total <= self._limit:
                    break
                if not self._is_in_use(path):
                    path.unlink(missing_ok=True)
                    total -= held[path].st_size
                elif path.suffix == ".partial":
                    arriving += held[path].st_size
            if total - arriving > self._limit:  # those of other readers come and go
                raise DataError(
                    f"{self.root} may hold {self._limit} bytes, and the shards that are needed at a time have {total}: "
                    "raise data.cache_bytes, or lower data.order.group_shards"
                )
            partial.touch()
            os.truncate(partial, record.size)

    def _is_in_use(self, path: Path) -> bool:
        """Whether a shard is needed here, or a partial file is being filled by a thread or process."""
        if path.suffix == ".partial":
            return is_held(path.with_suffix(".lock"))
        return str(path.relative_to(self.root)) in self._needed

    def _fetch(self, path: Path, partial: Path, record: ShardRecord, digests: NDArray[np.uint64]) -> None:
        url = f"{self._url}/{record.file}"
        _patiently(url, lambda: _copy(url, partial, record, digests))
        os.replace(partial, path)
        sync_directory(path.parent)


def _copy(url: str, partial: Path, record: ShardRecord, digests: NDArray[np.uint64]) -> None:
    """Fetches what is not there yet, block by block, each against its digest; the file has its full size throughout."""
    with partial.open("r+b" if partial.exists() else "w+b") as file:
        block = 0
        while block < record.blocks:  # what an earlier fetch has left
            data = file.read(BLOCK_BYTES)
            if not data or xxhash.xxh3_64_intdigest(data) != int(digests[block]):
                break
            block += 1
        file.truncate(record.size)
        file.seek(block * BLOCK_BYTES)
        if block == record.blocks:
            return
        with _open(url) as remote:
            remote.seek(block * BLOCK_BYTES)
            for number in range(block, record.blocks):
                wanted = min(BLOCK_BYTES, record.size - number * BLOCK_BYTES)
                data = remote.read(wanted)
                found, expected = xxhash.xxh3_64_intdigest(data), int(digests[number])
                if found != expected:
                    what = f"{len(data)} of {wanted} bytes" if len(data) != wanted else f"bytes of xxh3 {found:016x}"
                    raise _Wrong(f"it gave {what} from {number * BLOCK_BYTES} on, whose xxh3 should be {expected:016x}")
                file.write(data)
        file.flush()
        os.fsync(file.fileno())


class _Wrong(Exception):
    """What was fetched is not what should have been; another try may help."""


def _patiently(url: str, fetch: Callable[[], Result]) -> Result:
    """``fetch``, tried again with growing waits; errors of the local file system are raised at once."""
    for attempt in range(ATTEMPTS):
        try:
            return fetch()
        except ImportError as error:
            raise DataError(f"{url} needs a package that is not installed: {error}") from error
        except FileNotFoundError as error:
            raise DataError(f"{url} does not exist: check the address of the data set") from error
        except OSError as error:
            if error.errno in _LOCAL:
                raise
            problem: Exception = error
        except Exception as error:  # each file system of fsspec has errors of its own
            problem = error
        if attempt + 1 < ATTEMPTS:
            time.sleep(FIRST_WAIT * 2**attempt)
    raise DataError(
        f"{url} could not be fetched in {ATTEMPTS} tries ({type(problem).__name__}: {problem}): check the network and "
        "the address, and start the same command again; what has arrived is kept"
    ) from problem


def _open(url: str) -> Any:
    import fsspec  # takes a while to import, and local data has no need of it

    return fsspec.open(url, "rb").open()


def _read_whole(url: str) -> bytes:
    with _open(url) as remote:
        return bytes(remote.read())


def _fetch_small(base: str, folder: Path, described: dict[str, Any]) -> None:
    path, url = folder / described["file"], f"{base}/{described['file']}"

    def fetch() -> bytes:
        content = _read_whole(url)
        found = hashlib.sha256(content).hexdigest()
        if found != described["sha256"]:
            raise _Wrong(f"its sha256 is {found}, and the manifest says {described['sha256']}")
        return content

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, _patiently(url, fetch))
