"""``k2train inspect`` and ``k2train verify``."""

import pytest
import torch

from k2train.checkpoint import Interval, save_checkpoint
from k2train.checkpoint.intervals import SEGMENTS
from k2train.checkpoint.safetensors_file import write_safetensors
from k2train.cli import main
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.comm import World
from k2train.config import RunConfig, parse, to_dict

STATE = {
    "config": to_dict(parse(RunConfig, compose(TRAIN, ["experiment=tiny", "name=mine"]))),
    "progress": {"step": 40, "skipped_steps": 3, "elapsed": 75.0},
    "data": {"dataset": "d1", "tokenizer": "t1", "tokens": {"text": 12000}},
    "machine": {"processes": 8, "zero_stage": 2, "expert_parallel": 4, "precision": "bf16", "torch": "2.13"},
}


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(
        tmp_path / "mine" / "checkpoints",
        step=40,
        intervals=[Interval("w", key, 0, torch.arange(6.0)) for key in ("master", "momentum")],
        shapes={"w": (2, 3)},
        state=STATE,
        world=World(0, 1, 0, 1, torch.device("cpu")),
    )


def test_inspect_tells_what_it_is(saved, capsys):
    for words in ([str(saved)], [str(saved.parents[1])], [f"checkpoint={saved.parents[1]}"]):
        assert main(["inspect", *words]) == 0
        out = capsys.readouterr().out
        lines = dict(line.split("  ", 1) for line in out.partition("\n\n")[0].splitlines())
        rows = {name.strip(): text.strip() for name, text in lines.items()}
        assert rows["checkpoint"] == str(saved)
        assert rows["step"].startswith("40 of ")
        assert rows["parameters"] == "6"
        assert rows["skipped steps"] == "3"
        assert rows["data"] == "data set d1, tokenizer t1"
        assert rows["data read"] == "12.0k tokens of text"
        assert rows["layout"].startswith("8 processes, ZeRO-2, expert parallelism 4")
        assert rows["written with"] == "precision bf16, torch 2.13"
        assert "1m15s" in rows["tokens"]
        assert "in 2 files" in rows["size"]
        assert "router_bias_rate" in out  # and all settings


def test_verify_names_each_fault(saved, capsys):
    assert main(["verify", str(saved.parents[1])]) == 0
    assert "is whole: 2 files" in capsys.readouterr().out
    for path in (saved / "rank-00000.safetensors", saved / SEGMENTS):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["verify", str(saved)]) == 1
    err = capsys.readouterr().err
    assert err.count("is damaged: its hash is not the one in manifest.json") == 2


def test_verify_reads_what_the_hashes_cannot_tell(saved, capsys):
    """A table that was written wrong has the right hash."""
    from k2train.checkpoint import open_checkpoint
    from k2train.checkpoint.manifest import Manifest

    manifest = open_checkpoint(saved).manifest
    tables = {f"w/{key}": torch.tensor([[1, 0]]) for key in ("master", "momentum")}
    files = {**manifest.files, SEGMENTS: write_safetensors(saved / SEGMENTS, tables)}
    (saved / "manifest.json").write_text(Manifest(40, files, manifest.tensors, manifest.state).to_json())
    assert main(["verify", str(saved)]) == 1
    assert "segments.safetensors does not say where w/master is" in capsys.readouterr().err


def test_what_is_no_checkpoint(tmp_path, capsys):
    for command in ("inspect", "verify"):
        assert main([command, str(tmp_path)]) == 1
        assert f"k2train: error: {tmp_path} holds no checkpoint" in capsys.readouterr().err
        assert main([command, str(tmp_path / "step-00000001")]) == 1
        assert "manifest.json: it does not exist" in capsys.readouterr().err
