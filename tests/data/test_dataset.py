import json
import shutil
from pathlib import Path

import pytest
import torch

from k2train.data import DataError, Dataset, open_dataset
from k2train.data.dataset import IGNORED, SPLITS


def test_every_byte_of_every_document_is_there(dataset: Dataset, corpus: Path):
    found = {split: dict(dataset.documents(split)) for split in SPLITS}
    assert not found["train"].keys() & found["held_out"].keys()
    assert found["train"]
    assert found["held_out"]
    files = {str(path.relative_to(corpus)): path.read_bytes() for path in corpus.rglob("*.txt")}
    assert found["train"] | found["held_out"] == files
    for split in SPLITS:
        assert list(found[split]) == sorted(found[split])
        assert dataset.bytes(split) == sum(map(len, found[split].values()))
        assert dataset.tokens(split) == sum(
            len(dataset.tokenizer.encode(text.decode())) + 1 for text in found[split].values()
        )


def test_a_directory_is_on_one_side(dataset: Dataset):
    sides = {split: {origin.split("/")[0] for origin, _ in dataset.documents(split)} for split in SPLITS}
    assert not sides["train"] & sides["held_out"]


@pytest.mark.parametrize("length", [1, 7, 64, 100_000])
def test_windows_predict_each_token_once_from_the_one_before(dataset: Dataset, length: int):
    windows = dataset.windows("held_out", sequence_length=length)
    end = dataset.tokenizer.end_of_text
    stream = dataset.stream("held_out").read(0, dataset.tokens("held_out")).tolist()
    assert len(windows) == -(-len(stream) // length)
    tokens = torch.cat([window[0] for window in windows])
    labels = torch.cat([window[1] for window in windows])
    assert tokens.dtype == labels.dtype == torch.int64
    assert labels[: len(stream)].tolist() == stream
    assert set(labels[len(stream) :].tolist()) <= {IGNORED}
    assert tokens[: len(stream)].tolist() == [end, *stream[:-1]]
    assert set(tokens[len(stream) :].tolist()) <= {end}
    predicted = dataset.tokenizer.decode_bytes(token for token in labels.tolist() if token not in (IGNORED, end))
    assert len(predicted) == dataset.bytes("held_out")


def test_windows_are_a_sequence(dataset: Dataset):
    windows = dataset.windows("held_out", sequence_length=16)
    assert torch.equal(windows[-1][1], windows[len(windows) - 1][1])
    assert len(windows[2:5]) == 3
    assert torch.equal(windows[2:5][1][0], windows[3][0])
    with pytest.raises(IndexError):
        windows[len(windows)]
    with pytest.raises(ValueError, match="sequence_length=0"):
        dataset.windows("held_out", sequence_length=0)


def test_an_unknown_split_is_refused(dataset: Dataset):
    for call in (dataset.tokens, dataset.bytes, dataset.stream):
        with pytest.raises(ValueError, match="split='test' is unknown: it must be one of train, held_out"):
            call("test")


def manifest_of(dataset: Dataset) -> Path:
    return dataset.folder / "manifest.json"


def test_the_padded_vocabulary_follows_the_tokenizer(dataset: Dataset):
    assert dataset.tokenizer.vocab_size == 320
    assert dataset.padded_vocab_size == 320
    assert dataset.notes() == []


def read_all(manifest: Path) -> None:
    dataset = open_dataset(manifest)
    for split in SPLITS:
        assert list(dataset.documents(split))


def test_a_flipped_bit_in_any_shard_is_found_before_it_is_read(dataset: Dataset):
    shards = sorted(dataset.folder.glob("*/*-*.safetensors"))
    assert len(shards) == 2
    for path in shards:
        good = path.read_bytes()
        path.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])
        with pytest.raises(DataError, match=f"{path.name} is damaged in bytes 0 to "):
            read_all(manifest_of(dataset))
        path.write_bytes(good)
    read_all(manifest_of(dataset))


def test_another_tokenizer_is_found_at_open(dataset: Dataset):
    path = dataset.folder / "tokenizer.json"
    good = path.read_text()
    path.write_text(good + "\n")
    with pytest.raises(DataError, match=r"tokenizer.json did not encode this data"):
        open_dataset(manifest_of(dataset))
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer.json: it does not exist"):
        open_dataset(manifest_of(dataset))


def test_exchanged_digests_are_found_at_open(dataset: Dataset):
    path = dataset.folder / "folder" / "blocks.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DataError, match=r"blocks.safetensors are not those of this data: their sha256 is \w+ and"):
        open_dataset(manifest_of(dataset))


def test_exchanged_shards_are_found_when_they_are_read(dataset: Dataset):
    folder = dataset.folder / "folder"
    shutil.copy(folder / "train-00000.safetensors", folder / "held_out-00000.safetensors")
    with pytest.raises(DataError, match="bytes and its manifest says"):
        read_all(manifest_of(dataset))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda manifest: manifest.update(padded_vocab_size=512), "was changed after it was written"),
        (lambda manifest: manifest["sources"]["folder"].update(splits={}), "was changed after it was written"),
        (lambda manifest: manifest.pop("version"), r"is damaged \(KeyError\('version'\)\)"),
        (lambda manifest: manifest.update(version=99), "k2train-data version 99; this program reads .* version 2"),
    ],
)
def test_an_edited_manifest_is_refused(dataset: Dataset, edit, message):
    manifest = json.loads(manifest_of(dataset).read_text())
    edit(manifest)
    manifest_of(dataset).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        open_dataset(manifest_of(dataset))


def test_a_cut_or_missing_manifest_is_refused(dataset: Dataset):
    path = manifest_of(dataset)
    path.write_text(path.read_text()[:200])
    with pytest.raises(DataError, match=r"manifest.json is damaged"):
        open_dataset(path)
    path.unlink()
    with pytest.raises(DataError, match=r"no prepared data at .*manifest.json: prepare it first"):
        open_dataset(path)
