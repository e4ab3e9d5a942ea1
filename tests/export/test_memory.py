"""A model ten times larger than the memory that the process may take is exported, and imported again."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from small_run import same_tensors, write_run

ROOT = Path(__file__).parents[2]
ALLOWED = 32 << 20  # bytes of address space beside what Python and its libraries take

# A small model first, so that all is loaded; then the limit, which every page of memory and of mapped files counts in.
CODE = """
import resource, sys
from k2train.cli import main

small, large, out, allowed = *sys.argv[1:4], int(sys.argv[4])
def there_and_back(run, name):
    folder = f"{out}/{name}"
    assert main(["export", run, f"folder={folder}", "dtype=fp32", "compare=never", "shard_bytes=100000000"]) == 0
    assert main(["export", run, f"folder={folder}16", "dtype=bf16", "compare=never"]) == 0
    assert main(["import", folder, f"name={name}", f"runs_dir={out}/runs"]) == 0
there_and_back(small, "small")
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + allowed, taken + allowed))
try:
    bytearray(2 * allowed)
except MemoryError:
    print("limited")
there_and_back(large, "large")
"""


def test_more_than_memory(tmp_path, make_config):
    small = dataclasses.replace(make_config(0, "mla"), num_hidden_layers=2, first_k_dense_replace=1, n_group=1)
    small = dataclasses.replace(small, topk_group=1, n_routed_experts=4, num_experts_per_tok=2)
    write_run(tmp_path / "small", small)
    large = dataclasses.replace(small, hidden_size=512, moe_intermediate_size=512, n_routed_experts=110)
    model = write_run(tmp_path / "large", large)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 10 * ALLOWED
    done = subprocess.run(
        [sys.executable, "-c", CODE, *(str(tmp_path / n) for n in ("small", "large", "out")), str(ALLOWED)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "limited" in done.stdout
    same_tensors(tmp_path / "out" / "runs" / "large", model)
