from pathlib import Path

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import load_file

from k2train.data.errors import DataError
from k2train.data.manifest import BLOCK_BYTES, ShardRecord, block_digests
from k2train.data.reader import Folder, OpenShard
from k2train.data.shards import TENSORS, find_shard, write_shard

DOCUMENTS = [np.array([5, 6, 7, 0], np.uint32), np.array([0], np.uint32), np.array([300, 0], np.uint32)]
ORIGINS = ["a.py", "naïve/😀.py", "z"]


def write(path: Path, *, vocab_size: int = 400) -> tuple[ShardRecord, NDArray[np.uint64]]:
    numbers = {"document_ids": [2, 3, 7], "document_bytes": [10, 0, 4]}
    write_shard(path, DOCUMENTS, **numbers, origins=ORIGINS, vocab_size=vocab_size, unit="unit")
    made = find_shard(path.parent, path.name, unit="unit")
    assert made is not None
    return made


def checked(path: Path, made: tuple[ShardRecord, NDArray[np.uint64]]) -> OpenShard:
    shard = OpenShard(Folder(path.parent), *made)
    shard.check()
    return shard


@pytest.mark.parametrize(("vocab_size", "dtype"), [(400, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_what_is_written_is_read_back_by_us_and_by_safetensors(tmp_path, vocab_size, dtype):
    record, digests = write(tmp_path / "shard", vocab_size=vocab_size)
    assert (record.tokens, record.documents, record.text_bytes) == (7, 3, 14)
    shard = OpenShard(Folder(tmp_path), record, digests)
    assert shard.read(0, 7).dtype == dtype
    assert shard.read(0, 7).tolist() == [5, 6, 7, 0, 0, 300, 0]
    assert shard.read(2, 4).tolist() == [7, 0]
    assert shard.document_ends.tolist() == [4, 5, 7]
    assert shard.document_ids.tolist() == [2, 3, 7]
    assert [shard.origin(number) for number in range(3)] == ORIGINS
    theirs = load_file(tmp_path / "shard")
    assert set(theirs) == set(TENSORS)
    assert np.array_equal(theirs["tokens"], shard.read(0, 7))
    assert theirs["document_bytes"].tolist() == [10, 0, 4]


def test_equal_shards_are_equal_files(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_every_flipped_bit_is_found(tmp_path):
    made = write(tmp_path / "shard")
    data = bytearray((tmp_path / "shard").read_bytes())
    for position in range(len(data)):
        data[position] ^= 1 << position % 8
        (tmp_path / "shard").write_bytes(data)
        with pytest.raises(
            DataError, match=r"shard is damaged in bytes 0 to \d+: their xxh3 is \w+ and was \w+ .*: delete"
        ):
            checked(tmp_path / "shard", made)
        data[position] ^= 1 << position % 8


@pytest.mark.parametrize("keep", [0, 1, 8, 100, -1])
def test_a_cut_file_is_found(tmp_path, keep):
    made = write(tmp_path / "shard")
    (tmp_path / "shard").write_bytes((tmp_path / "shard").read_bytes()[:keep])
    with pytest.raises(DataError, match="bytes and its manifest says"):
        checked(tmp_path / "shard", made)
    assert find_shard(tmp_path, "shard", unit="unit") is None


def test_a_missing_file_is_named(tmp_path):
    made = write(tmp_path / "shard")
    (tmp_path / "shard").unlink()
    with pytest.raises(DataError, match="shard is missing: delete the folder"):
        checked(tmp_path / "shard", made)


def test_only_a_whole_shard_of_the_same_unit_is_kept(tmp_path):
    path = tmp_path / "shard"
    assert find_shard(tmp_path, "shard", unit="unit") is None
    write(path)
    assert find_shard(tmp_path, "shard", unit="another") is None
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for position in range(start, len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        assert find_shard(tmp_path, "shard", unit="unit") is None
    for junk in (b"", b"\0" * 8, b"\xff" * 40, (2).to_bytes(8, "little") + b"[]", (1).to_bytes(8, "little") + b"3"):
        path.write_bytes(junk)
        assert find_shard(tmp_path, "shard", unit="unit") is None


def test_a_digest_covers_each_block_of_the_file():
    data = bytes(range(256)) * (BLOCK_BYTES // 128) + b"end"
    digests = block_digests(data)
    assert [int(digest) for digest in digests] == [
        xxhash.xxh3_64_intdigest(data[start : start + BLOCK_BYTES]) for start in (0, BLOCK_BYTES, 2 * BLOCK_BYTES)
    ]
