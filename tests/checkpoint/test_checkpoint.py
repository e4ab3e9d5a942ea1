import errno

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from k2train.checkpoint import CheckpointError, Interval, Manifest, newest_checkpoint, prune, save_checkpoint
from k2train.comm import FailedTogether, World

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
SHAPES = {"a.weight": (3, 5), "experts.w1": (4, 2, 3), "bias": (7,)}


def _full(name: str, offset: float = 0) -> torch.Tensor:
    numel = int(torch.tensor(SHAPES[name]).prod())
    return torch.arange(numel, dtype=torch.float32) + offset


def _cut(name: str, start: int, stop: int, key: str = "master") -> Interval:
    return Interval(name, key, start, _full(name)[start:stop])


def _save(directory, step=1, intervals=None):
    whole = [_cut(name, 0, len(_full(name))) for name in SHAPES]
    return save_checkpoint(
        directory, step=step, intervals=intervals or whole, shapes=SHAPES, state={"seed": 7}, world=ALONE
    )


def _two_ranks(rank: int, store: str, directory) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    world = World(rank, 2, rank, 2, CPU)
    mine = [
        [_cut("a.weight", 0, 4), _cut("experts.w1", 12, 24), _cut("bias", 0, 7)],
        [_cut("a.weight", 4, 15), _cut("experts.w1", 0, 12)],
    ][rank]
    save_checkpoint(directory, step=12, intervals=mine, shapes=SHAPES, state={"seed": 7}, world=world)
    found = newest_checkpoint(directory, world=world, say=print)
    assert found is not None
    assert found.manifest.step == 12
    # One rank cannot write: nothing is published, and both know.
    if rank == 1:
        directory = directory / "file" / "below"
    with pytest.raises((OSError, FailedTogether)):
        save_checkpoint(directory, step=13, intervals=mine, shapes=SHAPES, state={}, world=world)
    dist.destroy_process_group()


def test_two_ranks_write_and_another_layout_reads(tmp_path):
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    (directory / "file").touch()
    mp.spawn(_two_ranks, args=(str(tmp_path / "store"), directory), nprocs=2)
    assert [f.name for f in directory.glob("step-*[0-9]")] == ["step-00000012"]
    found = newest_checkpoint(directory, world=ALONE, say=print)
    reader = found.reader()
    assert found.manifest.state == {"seed": 7}
    for name, shape in SHAPES.items():
        assert torch.equal(reader.read(name, "master"), _full(name).view(shape))
    out = torch.empty(9)
    reader.fill("experts.w1", "master", 7, out)
    assert torch.equal(out, _full("experts.w1")[7:16])
    with pytest.raises(CheckpointError, match=r"no momentum of bias.*another model"):
        reader.read("bias", "momentum")
    with pytest.raises(CheckpointError, match="3 of the 5 elements"):
        reader.fill("bias", "master", 4, torch.empty(5))


@pytest.mark.parametrize(
    ("cuts", "sentence"),
    [
        ([(0, 4), (5, 7)], "elements 4 to 5 of bias/master are missing"),
        ([(0, 4), (3, 7)], "elements 3 to 4 of bias/master are there twice"),
        ([(0, 4)], r"bias/master of shape \[7\] ends at element 4"),
    ],
)
def test_intervals_that_do_not_tile_are_refused(tmp_path, cuts, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        _save(tmp_path, intervals=[_cut("bias", *cut) for cut in cuts])
    assert newest_checkpoint(tmp_path, world=ALONE, say=print) is None


def _flip(folder):
    path = folder / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def _cut_short(folder):
    path = folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _lose_file(folder):
    (folder / "rank-00000.safetensors").unlink()


def _other_format(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format":1', '"format":99'))


def _tear_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_flip, "is damaged: its hash"),
        (_cut_short, "bytes instead of"),
        (_lose_file, "No such file"),
        (_other_format, "format 99, this version reads 1"),
        (_tear_manifest, "manifest is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_reason(tmp_path, damage, sentence):
    _save(tmp_path, step=1)
    damage(_save(tmp_path, step=2))
    (tmp_path / "step-00000003.partial").mkdir()
    said = []
    found = newest_checkpoint(tmp_path, world=ALONE, say=said.append)
    assert found.manifest.step == 1
    assert len(said) == 1
    assert sentence in said[0]


def test_a_full_disk_publishes_nothing_and_keeps_its_errno(tmp_path, monkeypatch):
    def full(tensors, path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("k2train.checkpoint.intervals.save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        _save(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert newest_checkpoint(tmp_path, world=ALONE, say=print) is None


def test_prune_keeps_the_newest_and_removes_broken_off_writes(tmp_path):
    for step in (1, 20, 3):
        _save(tmp_path, step=step)
    (tmp_path / "step-00000021.partial").mkdir()
    prune(tmp_path, keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000003", "step-00000020"]


def test_the_manifest_survives_a_round_trip(tmp_path):
    text = (_save(tmp_path) / "manifest.json").read_text()
    assert Manifest.from_json(text).to_json() == text
