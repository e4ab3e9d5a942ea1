"""``k2train audit``: what it prints, on one process and two, and that a wrong update is told and counts."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from muonclip import QKClip
from muonclip.audit import Rule
from rich.console import Console

from k2train.cli.audit import show
from k2train.train.audit import Row

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_two_processes_with_experts_shared_out_and_every_head_clipped(tmp_path):
    words = [
        "experiment=tiny",
        "data=folder",
        f"data.path={ROOT / 'k2train' / 'train'}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    words += ["data.tokenizer.vocab_size=300", f"runs_dir={tmp_path}", "optim.tau=0.01", "parallel.zero_stage=3"]
    words += ["parallel.expert_parallel=2", "train.micro_batch_size=1", "train.sequence_length=32"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launcher, "-m", "k2train", "audit", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    tables = lines[lines.index("How each parameter is updated") :]
    assert max(map(len, tables)) <= 120
    exchange = result.stdout.split("Who orthogonalises what")[1].splitlines()
    shared = {role: line.split() for line in exchange[2:6] for role in [line.split()[0]]}
    assert set(shared) == {"attention", "mlp", "expert", "router"}
    assert shared["expert"][1:5] == ["24", "24", "0", "0"]  # each rank has its own 8 experts of three matrices
    assert all(int(row[2]) + int(row[3]) == int(row[1]) for row in shared.values())
    first, second = (result.stdout.split(title)[1] for title in ("How each parameter is updated", "What one step did"))
    assert "expert     8 x [64, 96]  Muon, scale 1.96  0.01  0.1" in first
    assert "norm       [96]          AdamW             0.01  0" in first
    rows = [line for line in second.splitlines() if "weight" in line or "experts.w" in line]
    assert len(rows) == 47
    assert all(row.rstrip().endswith("ok") for row in rows)
    assert "12 of 12 heads clipped" in lines[-2]
    assert lines[-1] == "47 parameters and 74 orthogonalised matrices: each updated as it should be, once"
    assert not (tmp_path / "tiny" / "config.json").exists()  # the run of this name has not begun


def rows(fault: str | None) -> list[Row]:
    muon = Rule("layers.0.experts.w1", "expert", (4, 6, 9), "muon", 0.01, 0.1, ((6, 9),) * 4)
    adamw = Rule("norm.weight", "norm", (9,), "adamw", 0.01, 0.0, ())
    return [
        Row(muon, 8, (0.5, 1.13), (0.5, 1.13), (0.17, 0.19), (0.17, 0.19), fault),
        Row(adamw, 0, None, None, (1.0, 1.0), (1.0, 1.0), None),
    ]


def shown(fault: str | None) -> str:
    layer = SimpleNamespace(max_logits=torch.zeros(2), reset_max_logits=None, row_scales=None)
    trainer = SimpleNamespace(clip=QKClip([("a", layer)], observe_only=True))
    stream = io.StringIO()
    show(trainer, rows(fault), Console(file=stream, width=120, highlight=False))
    return stream.getvalue()


def test_a_right_update():
    text = shown(None)
    assert "8 x [6, 9]  Muon, scale 0.6  0.01  0.1" in text
    assert "0.50 to 1.13     0.50 to 1.13  0.170 to 0.190  0.170 to 0.190  ok" in text
    assert "QK-Clip: off, watching only" in text
    assert text.endswith("2 parameters and 8 orthogonalised matrices: each updated as it should be, once\n")


def test_a_wrong_update_is_told():
    text = shown("singular values off by 0.3 [x] (2 more)")
    assert "0.170 to 0.190  wrong" in text
    assert "\nlayers.0.experts.w1: singular values off by 0.3 [x] (2 more)\n" in text
    assert text.endswith("1 of 2 parameters were not updated as they should be\n")
