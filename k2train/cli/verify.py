"""``k2train verify``: whether a checkpoint is whole."""

from __future__ import annotations

import sys
from pathlib import Path

from k2train.checkpoint import CheckpointError, choose_checkpoint
from k2train.config import CheckConfig
from k2train.paths import explain_oserror
from k2train.units import memory


def run(config: CheckConfig) -> int:
    """Names each fault; returns the exit status, 1 if there is any."""
    try:
        checkpoint = choose_checkpoint(Path(config.checkpoint).expanduser())
        faults = list(checkpoint.faults())
        if not faults:
            checkpoint.check_segments()
    except CheckpointError as error:
        faults = [str(error)]
    except OSError as error:
        faults = [explain_oserror(error)]
    if faults:
        print("\n".join(f"k2train: error: {fault}" for fault in faults), file=sys.stderr)
        return 1
    files, tensors = checkpoint.manifest.files, checkpoint.manifest.tensors
    print(f"{checkpoint.folder} is whole: {len(files)} files, {memory(checkpoint.size)}, {len(tensors)} tensors")
    return 0
