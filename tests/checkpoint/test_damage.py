"""Whatever happens to a file of a checkpoint is seen, the one before it is used, and the person is told."""

import random
import shutil
from pathlib import Path

import pytest

from k2train.checkpoint import CheckpointError, newest_checkpoint
from k2train.cli import main
from tests.checkpoint.small import ALONE, save


def damage(path: Path, rng: random.Random) -> str:
    """Flips a bit, cuts off the end, or deletes the file."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "truncate", "delete"])
    if kind == "flip":
        data[place := rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        return f"flipped a bit of byte {place} of {path.name}"
    if kind == "truncate":
        path.write_bytes(data[: (length := rng.randrange(len(data)))])
        return f"cut {path.name} to {length} bytes"
    path.unlink()
    return f"deleted {path.name}"


@pytest.mark.parametrize("seed", range(60))
def test_a_random_damage_is_seen(tmp_path, seed, capsys):
    rng = random.Random(seed)
    save(tmp_path, step=1)
    newest = save(tmp_path, step=2)
    victim = rng.choice([*sorted(newest.iterdir()), tmp_path / "latest"])
    what = damage(victim, rng)
    said = []
    found = newest_checkpoint(tmp_path, world=ALONE, say=said.append)
    if victim.name == "latest":  # says where to look, no more: the checkpoints are whole
        assert found.manifest.step == 2, what
        assert "latest" in said[0], what
    else:
        assert found.manifest.step == 1, what
        assert said[0].startswith(f"passing over {newest}: "), what
        assert main(["verify", str(tmp_path)]) == 1, what
        assert "k2train: error: " in capsys.readouterr().err
    found.check_segments()


def test_every_single_bit_of_the_manifest_counts(tmp_path):
    save(tmp_path, step=1)
    path = save(tmp_path, step=2) / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        torn = bytearray(whole)
        torn[place] ^= 1 << place % 8
        path.write_bytes(torn)
        assert newest_checkpoint(tmp_path, world=ALONE, say=lambda text: None).manifest.step == 1, place


def test_where_none_is_whole_nothing_begins_anew_by_itself(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step=step) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* is whole"):
        newest_checkpoint(tmp_path, world=ALONE, say=lambda text: None)
    shutil.rmtree(tmp_path)
    assert newest_checkpoint(tmp_path, world=ALONE, say=pytest.fail) is None
