import errno
import os
import shutil
import time
from collections import namedtuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from k2train.checkpoint import (
    CheckpointError,
    Manifest,
    SaveError,
    find_checkpoint,
    mark_best,
    newest_checkpoint,
    open_checkpoint,
    prune,
    save_checkpoint,
    steps,
)
from k2train.comm import World
from tests.checkpoint.small import ALONE, SHAPES, cut, full, save


def two_ranks(rank: int, store: str, directory) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    world = World(rank, 2, rank, 2, torch.device("cpu"))
    mine = [
        [cut("a.weight", 0, 4), cut("experts.w1", 12, 24), cut("bias", 0, 7)],
        [cut("a.weight", 4, 15), cut("experts.w1", 0, 12)],
    ][rank]
    save_checkpoint(directory, step=12, intervals=mine, shapes=SHAPES, state={"seed": 7}, world=world)
    found = newest_checkpoint(directory, world=world, say=print)
    assert found is not None
    assert found.manifest.step == 12

    # One rank cannot write: nothing is published, nothing is left, and both say the same.
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/rank-1")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("k2train.checkpoint.publish.write_intervals", refuse)
        with pytest.raises(SaveError, match=r"step 13 was not saved: rank 1: /disk/rank-1: the disk is full"):
            save_checkpoint(directory, step=13, intervals=mine, shapes=SHAPES, state={}, world=world)
    # Each rank has a disk of its own: rank 1 finds no folder to write into.
    own = directory / f"of-rank-{rank}"
    with pytest.raises(CheckpointError, match=r"rank 1: .*step-00000014.partial, written by rank 0, is not there on"):
        save_checkpoint(own, step=14, intervals=mine, shapes=SHAPES, state={}, world=world)
    # It finds one, and rank 0 does not see what it wrote there.
    (own / "step-00000015.partial").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"rank 0: .*rank-00001.safetensors, written by .*is not there on"):
        save_checkpoint(own, step=15, intervals=mine, shapes=SHAPES, state={}, world=world)
    assert steps(own) == []
    dist.destroy_process_group()


def test_two_ranks_write_and_another_layout_reads(tmp_path):
    directory = tmp_path / "checkpoints"
    mp.spawn(two_ranks, args=(str(tmp_path / "store"), directory), nprocs=2)
    assert sorted(f.name for f in directory.glob("step-*")) == ["step-00000012"]
    assert (directory / "latest").read_text() == "step-00000012\n"
    found = newest_checkpoint(directory, world=ALONE, say=print)
    found.check_segments()
    assert found.manifest.state == {"seed": 7}
    for name, shape in SHAPES.items():
        assert torch.equal(found.reader.read(name, "master"), full(name).view(shape))
    for start in range(24):  # each cut there is, over the seam at 12
        for stop in range(start, 25):
            out = torch.empty(stop - start)
            found.reader.fill("experts.w1", "master", start, out)
            assert torch.equal(out, full("experts.w1")[start:stop])
    with pytest.raises(CheckpointError, match=r"no momentum of bias.*another model"):
        found.reader.read("bias", "momentum")
    with pytest.raises(CheckpointError, match="elements 0 to 7 of bias/master, not 4 to 9"):
        found.reader.fill("bias", "master", 4, torch.empty(5))


@pytest.mark.parametrize(
    ("cuts", "sentence"),
    [
        ([(0, 4), (5, 7)], "elements 4 to 5 of bias/master are missing"),
        ([(0, 4), (3, 7)], "elements 3 to 4 of bias/master are there twice"),
        ([(0, 4)], r"bias/master of shape \[7\] ends at element 4"),
    ],
)
def test_intervals_that_do_not_tile_are_refused(tmp_path, cuts, sentence):
    with pytest.raises(CheckpointError, match=sentence) as caught:
        save(tmp_path, intervals=[cut("bias", *each) for each in cuts])
    assert not isinstance(caught.value, SaveError)  # another try would not help
    assert list(tmp_path.iterdir()) == []


def test_there_must_be_room(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 0, 1 << 20))
    sentence = rf"takes 184 B and the disk of {tmp_path} has 1 MiB free: make room, or keep fewer with checkpoint.keep"
    with pytest.raises(SaveError, match=sentence):
        save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_publishes_nothing(tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(SaveError, match=r"step 2 was not saved: .*rank-00000.safetensors: the disk is full"):
        save(tmp_path, step=2)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path, world=ALONE, say=pytest.fail).manifest.step == 1


def test_a_writer_killed_between_folder_and_latest_is_told(tmp_path, monkeypatch):
    save(tmp_path)
    before = (tmp_path / "latest").read_bytes()
    save(tmp_path, step=2)
    (tmp_path / "latest").write_bytes(before)
    said = []
    assert newest_checkpoint(tmp_path, world=ALONE, say=said.append).manifest.step == 2
    assert "names step-00000001: going by the folders, step-00000002 is the newest whole one" in said[0]


def test_the_same_step_once_more_takes_the_place_of_the_first(tmp_path):
    save(tmp_path)
    again = [cut("bias", 0, 7)]
    folder = save(tmp_path, intervals=again)
    assert list(open_checkpoint(folder).manifest.tensors) == ["bias/master"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", folder.name]


def test_prune_keeps_the_newest_the_best_and_every_so_many(tmp_path):
    for step in (1, 3, 10, 12, 20, 21, 23):
        save(tmp_path, step=step)
    (tmp_path / "step-00000024.partial").mkdir()
    (tmp_path / "step-00000001.replaced").mkdir()
    mark_best(tmp_path, 3)
    prune(tmp_path, keep=2, every=10)
    assert steps(tmp_path) == [23, 21, 20, 10, 3]
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*.replaced")]
    hour_ago = time.time() - 3600
    for step in (10, 20):
        os.utime(tmp_path / f"step-{step:08d}", (hour_ago, hour_ago))
    prune(tmp_path, keep=1, since=hour_ago + 60)
    assert steps(tmp_path) == [23, 21, 3]  # 21 is young, 3 the best
    mark_best(tmp_path, 23)
    prune(tmp_path, keep=1)
    assert steps(tmp_path) == [23]


def test_a_path_may_be_a_checkpoint_or_a_run(tmp_path):
    folder = save(tmp_path / "checkpoints", step=5)
    save(tmp_path / "checkpoints", step=6)
    for path, step in ((folder, 5), (tmp_path, 6), (tmp_path / "checkpoints", 6)):
        assert find_checkpoint(path, world=ALONE, say=pytest.fail).manifest.step == step
    with pytest.raises(CheckpointError, match="nowhere holds no checkpoint: give the folder of a run"):
        find_checkpoint(tmp_path / "nowhere", world=ALONE, say=pytest.fail)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000005 cannot be used: .*manifest.json: it does not exist"):
        find_checkpoint(folder, world=ALONE, say=pytest.fail)


def test_the_manifest_survives_a_round_trip(tmp_path):
    text = (save(tmp_path) / "manifest.json").read_text()
    assert Manifest.from_json(text).to_json() == text


def test_another_format_is_refused_with_a_way_out(tmp_path):
    path = save(tmp_path) / "manifest.json"
    path.write_text(path.read_text().replace('"format":2', '"format":1'))
    with pytest.raises(CheckpointError, match="format 1, this version reads 2: finish the run with the k2train that"):
        open_checkpoint(path.parent)
