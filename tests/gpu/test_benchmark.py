"""The GPU benchmark on a machine that has none."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_says_so_in_a_sentence():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("benchmarks/gpu.py needs a CUDA device, and torch ")
    assert result.stderr.count("\n") == 1
