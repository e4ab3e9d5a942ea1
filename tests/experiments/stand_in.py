"""Stands in for ``k2train train`` in tests of sweeps: takes its overrides and leaves a summary, in milliseconds."""

import json
import sys
import time
from pathlib import Path

from k2train.lock import held_alone

words = dict(word.split("=", 1) for word in sys.argv[1:])
folder = Path(words["runs_dir"]) / words["name"]
lr, seed = float(words.get("optim.lr", 0.02)), int(words.get("seed", 0))
with held_alone(folder / "lock", patience=0, busy="trains here"):
    with open(folder / "starts", "a") as starts:
        starts.write("started\n")
    time.sleep(float(words.get("generate.temperature", 0)))
    if lr > 1:
        sys.exit("k2train: error: the loss is not finite")
    loss = 2 + (lr - 0.03) ** 2 + seed / 1000
    (folder / "summary.json").write_text(json.dumps({"validation_bits_per_byte": loss, "validation_loss": 3 * loss}))
