"""Shards behind a slow and failing HTTP server, through a bounded cache that several processes may fill."""

import errno
import http.server
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from synthetic_data import documents_of, make_dataset

import k2train.data.cache as cache_module
from k2train.data import DataError, DataPhase, TrainStream, open_dataset
from k2train.data.cache import CachedFolder, fetch_dataset, find_dataset
from k2train.lock import held_alone


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges; ``faults`` are what to do wrong with the next requests of shards."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults, self.asked = folder, [], Counter()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *words) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, is_shard = path.read_bytes(), "train-" in path.name
        fault = self.server.faults.pop(0) if is_shard and body and self.server.faults else ""
        if is_shard and body:
            self.server.asked[self.path] += 1
        if fault == "error":
            self.send_error(503)
            return
        if fault == "slow":
            time.sleep(0.3)
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        first, last = 0, len(data) - 1
        if wanted := self.headers.get("Range"):
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(last, int(end or last))
        part = data[first : last + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "made", {"one": documents_of(60, seed=1), "two": documents_of(40, seed=2)})


@pytest.fixture
def server(local: Path):
    server = Server(local.parent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(cache_module, "FIRST_WAIT", 0.01)


PHASES = [DataPhase(200, 16)]


def read(path: Path, numbers=range(0, 200, 7), **settings) -> list[list[int]]:
    stream = TrainStream(open_dataset(path), PHASES, seed=3, **settings)
    return [stream.batch([number])[1][0].tolist() for number in numbers]


def test_remote_samples_are_the_local_ones_and_each_shard_is_fetched_once(server, local, tmp_path):
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=None)
    assert not server.asked  # nothing but the small files
    assert read(path) == read(local)
    assert read(path) == read(local)
    assert set(server.asked.values()) == {1}


def test_faults_of_the_server_are_waited_out(server, local, tmp_path):
    server.faults[:] = ["error", "cut", "flip", "slow", "error"]
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=None)
    assert read(path) == read(local)
    assert server.faults == []


def test_a_server_that_never_recovers_is_one_sentence(server, tmp_path):
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=None)
    server.faults[:] = ["flip"] * 1000
    with pytest.raises(
        DataError,
        match=r"http://\S+train-\d+.safetensors could not be fetched in 6 tries \(.*xxh3.*\): check the network",
    ):
        read(path)
    assert not list(path.parent.glob("*/train-*.safetensors"))  # nothing that is wrong was kept


def test_an_address_without_data_is_one_sentence(server, tmp_path):
    with pytest.raises(DataError, match=r"http://\S+/nowhere/manifest.json does not exist: check the address"):
        fetch_dataset(f"{server.url}/nowhere", cache=tmp_path / "cache", limit=None)


def test_an_interrupted_fetch_goes_on_where_it_was(server, local, tmp_path, monkeypatch):
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=None)
    name = "one/train-00000.safetensors"
    monkeypatch.setattr(cache_module, "ATTEMPTS", 1)
    whole = (local.parent / name).read_bytes()
    (path.parent / "one").mkdir(exist_ok=True)
    for left in (whole[:1000], b"x" * 100, whole + b"more"):
        (path.parent / f"{name}.partial").write_bytes(left)
        shard = open_dataset(path).stream("train", "one").shards[0]
        shard.check()
        assert (path.parent / name).read_bytes() == whole
        (path.parent / name).unlink()


def test_a_bounded_cache_keeps_what_is_needed_now_and_next(server, local, tmp_path):
    sizes = [file.stat().st_size for file in local.parent.glob("*/train-*.safetensors")]
    limit = 7 * max(sizes)  # two sources, of each two groups of a shard and the one they may reach into
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=limit)
    stream = TrainStream(open_dataset(path), PHASES, seed=3, group_shards=1)
    same = TrainStream(open_dataset(local), PHASES, seed=3, group_shards=1)
    for number in range(200):
        assert stream.batch([number])[1].tolist() == same.batch([number])[1].tolist()
        held = list(path.parent.glob("*/train-*.safetensors"))
        assert len(held) <= 7
    assert max(server.asked.values()) > 1  # some were dropped and came again


def test_what_another_reader_fetches_counts_as_held(server, tmp_path):
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=1)
    shards = open_dataset(path).stream("train", "one").shards
    a, b, theirs = (path.parent / shard.record.file for shard in shards[:3])
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=2 * max(shard.record.size for shard in shards))
    cache = CachedFolder(path.parent)
    cache.shard(shards[0].record, shards[0].digests)
    partial = theirs.with_name(f"{theirs.name}.partial")
    with held_alone(theirs.with_name(f"{theirs.name}.lock"), patience=0, busy=""):
        partial.touch()
        os.truncate(partial, shards[2].record.size)
        cache.shard(shards[1].record, shards[1].digests)
        assert (a.exists(), b.exists(), partial.exists()) == (False, True, True)
    os.utime(partial, (0, 0))
    cache.shard(shards[0].record, shards[0].digests)  # nobody goes on with theirs
    assert (a.exists(), b.exists(), partial.exists()) == (True, True, False)


def test_a_bound_too_low_for_what_is_needed_says_how_much_that_is(server, tmp_path):
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=1000)
    with pytest.raises(DataError, match=r"may hold 1000 bytes, and .* have \d+: raise data.cache_bytes, or lower"):
        read(path)


def _read_in_process(path: Path, results) -> None:
    results.put(read(path))


def test_two_processes_filling_one_cache_fetch_each_shard_once(server, local, tmp_path):
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=None)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_read_in_process, args=(path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found == [read(local)] * 2
    assert set(server.asked.values()) == {1}


def test_a_process_that_hangs_while_it_fetches_is_named(server, tmp_path, monkeypatch):
    path = fetch_dataset(server.url, cache=tmp_path, limit=None)
    stream = TrainStream(open_dataset(path), [DataPhase(10, 16)], seed=1)
    first = stream.trace(0).spans[0].shard
    (path.parent / first).unlink()
    monkeypatch.setattr(cache_module, "PATIENCE", 0.3)
    again = TrainStream(open_dataset(path), [DataPhase(10, 16)], seed=1)
    with (
        held_alone(path.parent / f"{first}.lock", patience=0, busy=""),
        pytest.raises(DataError, match=rf"another process \(pid {os.getpid()} on .*\) has been fetching this"),
    ):
        again.batch([0])
    again.batch([0])


def test_a_full_disk_and_a_read_only_cache_are_one_sentence_each(server, tmp_path, monkeypatch):
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=None)
    for number, message in ((errno.ENOSPC, "the disk is full"), (errno.EROFS, "the file system is read-only")):

        def refuse(*words, number=number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(cache_module, "_copy", refuse)
        with pytest.raises(DataError, match=rf"train-\d+.safetensors: {message}"):
            read(path)
        monkeypatch.undo()


def test_a_full_cache_that_is_read_only_can_be_read(server, local, tmp_path):
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=None)
    assert read(path, range(200)) == read(local, range(200))
    for folder in ("one", "two"):
        (path.parent / folder).chmod(0o555)
    try:
        assert read(path, range(200)) == read(local, range(200))
    finally:
        for folder in ("one", "two"):
            (path.parent / folder).chmod(0o755)


def test_a_damaged_shard_of_the_cache_is_named_with_its_remedy(server, tmp_path):
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=None)
    read(path, range(200))
    shard = next(path.parent.glob("one/train-*.safetensors"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"is damaged in bytes .*: delete {shard}, and it is fetched again from http"):
        read(path, range(200))
    shard.unlink()
    read(path, range(200))


def test_a_folder_elsewhere_needs_no_cache(local, tmp_path):
    moved = shutil.copytree(local.parent, tmp_path / "moved")
    assert find_dataset(str(moved), cache=tmp_path, limit=None) == moved / "manifest.json"
    assert read(find_dataset(str(moved / "manifest.json"), cache=tmp_path, limit=None)) == read(local)


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(DataError, match=r"s3://\S+ needs a package that is not installed"):
        fetch_dataset("s3://bucket/data", cache=tmp_path, limit=None)


def test_shards_that_are_needed_next_are_fetched_ahead(server, tmp_path):
    path = fetch_dataset(server.url, cache=tmp_path / "cache", limit=None)
    shards = open_dataset(path).stream("train", "one").shards
    CachedFolder(path.parent).keep([(shards[0].record, shards[0].digests)])
    deadline = time.monotonic() + 20
    while not (path.parent / shards[0].record.file).is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
