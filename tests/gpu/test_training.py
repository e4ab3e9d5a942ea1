"""The command line on a CUDA device in bf16, as a person would start it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
ROOT = Path(__file__).parents[2]


def k2train(folder: Path, command: str, *words: str) -> subprocess.CompletedProcess:
    own = ["experiment=tiny", "data=folder", f"data.path={ROOT / 'k2train'}", f"data.cache_dir={folder / 'cache'}"]
    own += ["data.tokenizer.vocab_size=512", f"runs_dir={folder}", "track.wandb=off", "track.log_every=1"]
    return subprocess.run(
        [sys.executable, "-m", "k2train", command, *own, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "optim"), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
    )


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.parametrize("offload", ["false", "true"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_in_bf16_learns_and_starts_as_one_in_fp32(tmp_path, stage, offload):
    words = [
        f"parallel.zero_stage={stage}",
        f"parallel.offload_optimizer={offload}",
        "optim.newton_schulz_dtype=bf16",
        "train.precision=bf16",
    ]
    result = k2train(tmp_path, "train", "name=bf16", f"train.device={DEVICE}", *words)
    assert result.returncode == 0, result.stderr
    found = losses(tmp_path, "bf16")
    assert len(found) == 20
    assert found[-1] < 0.9 * found[0]
    result = k2train(tmp_path, "train", "name=fp32", "train.device=cpu", "schedule.steps=2")
    assert result.returncode == 0, result.stderr
    assert found[0] == pytest.approx(losses(tmp_path, "fp32")[0], abs=0.02)


def test_the_audit_passes(tmp_path):
    result = k2train(tmp_path, "audit", f"train.device={DEVICE}", "train.precision=bf16")
    assert result.returncode == 0, result.stdout + result.stderr
