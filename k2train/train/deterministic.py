"""``train.deterministic``: the same bits from two runs on the same machine, also on a GPU.

What torch and its libraries choose by speed, or compute by atomic additions in any order, is chosen and computed one
way; an operation that has no such way raises an error that names it. On a CPU a run is deterministic anyway.
"""

from __future__ import annotations

import os

import torch

# Of cuBLAS: with a workspace of its own for each stream it takes the same kernel each time (its documentation, section
# "Results reproducibility"). It must be set before cuBLAS is first used.
WORKSPACE = ":4096:8"


def make_deterministic() -> None:
    """For the rest of this process; before anything is computed on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
