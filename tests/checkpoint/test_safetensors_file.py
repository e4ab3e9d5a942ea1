import hashlib
import json

import pytest
import safetensors.torch
import torch
import xxhash

from k2train.checkpoint import CheckpointError
from k2train.checkpoint.safetensors_file import DTYPES, Deferred, SafetensorsFile, read_header, write_safetensors


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {"odd": torch.arange(5, dtype=torch.uint8), "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    for number, dtype in enumerate(DTYPES):
        found[f"grüße/{number}"] = torch.randint(0, 2, (3, 7 + number), generator=generator).to(dtype)
    return found | {"strided": torch.arange(12.0).view(3, 4).T}


def test_the_library_reads_what_we_write(tmp_path):
    path = tmp_path / "a.safetensors"
    record = write_safetensors(path, tensors())
    data = path.read_bytes()
    assert (record.size, record.xxh3_128) == (len(data), xxhash.xxh3_128_hexdigest(data))
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors().keys()
    for name, wanted in tensors().items():
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted), name
    with safetensors.safe_open(path, "pt") as file:  # and by parts
        assert torch.equal(file.get_slice("odd")[2:4], tensors()["odd"][2:4])


def test_what_is_made_when_it_is_written_is_the_same_file(tmp_path):
    made = []

    def make(name):
        made.append(name)
        return tensors()[name]

    deferred = {n: Deferred(tuple(t.shape), t.dtype, lambda n=n: make(n)) for n, t in tensors().items()}
    assert not made
    assert write_safetensors(tmp_path / "a", deferred) == write_safetensors(tmp_path / "b", tensors())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(made) == sorted(tensors())  # each once
    assert {n: d.nbytes for n, d in deferred.items()} == {n: t.nbytes for n, t in tensors().items()}


def test_we_read_what_the_library_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    there = {name: tensor.contiguous() for name, tensor in tensors().items()}
    safetensors.torch.save_file(there, path)
    file = SafetensorsFile(path)
    assert file.hash() == xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert file.header == read_header(path)
    for name, wanted in there.items():
        data = file.bytes(name, 0, wanted.numel())
        assert data.tobytes() == wanted.view(-1).view(torch.uint8).numpy().tobytes(), name


def test_written_bytes_are_those_of_the_tensors_in_few_and_in_many_chunks(tmp_path, monkeypatch):
    digests = set()
    for chunk in (7, 1 << 24):
        monkeypatch.setattr("k2train.checkpoint.safetensors_file.CHUNK", chunk)
        record = write_safetensors(tmp_path / "a.safetensors", tensors())
        digests.add((record, hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()))
    assert len(digests) == 1


@pytest.mark.parametrize("data", [b"", b"\xff" * 20, b"\x04" + b"\0" * 7 + b"nope", json.dumps([1]).encode()])
def test_what_is_no_such_file_is_refused(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_header(path)
    with pytest.raises(CheckpointError):
        SafetensorsFile(path).bytes("a", 0, 1)
