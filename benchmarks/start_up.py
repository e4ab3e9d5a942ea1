"""How long a person waits: for help, and for the first training step with the data prepared.

    python benchmarks/start_up.py

The bars, on 2 idle cores: 0.5 s for help, and 25 s from the start of the process for the first step.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 5
K2TRAIN = [sys.executable, "-m", "k2train"]


def seconds_of_help() -> float:
    """Median of some starts of ``k2train train --help``, from the start of the process to its end."""
    found = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        subprocess.run([*K2TRAIN, "train", "--help"], check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def seconds_to_first_step(folder: Path) -> float:
    """From the start of ``k2train train`` with its default settings to the first line of metrics.jsonl."""
    own = [f"runs_dir={folder}", "track=off"]
    subprocess.run([*K2TRAIN, "prepare"], check=True, stdout=subprocess.DEVNULL)
    begin = time.perf_counter()
    with subprocess.Popen([*K2TRAIN, "train", *own], stdout=subprocess.DEVNULL) as process:
        metrics = folder / "first" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"the run ended with status {process.returncode} before its first step")
            time.sleep(0.02)
        found = time.perf_counter() - begin
        process.kill()
    return found


def main() -> None:
    """Prints both."""
    print(f"help: {seconds_of_help():.2f} s (median of {REPEATS})")
    with tempfile.TemporaryDirectory() as folder:
        print(f"first training step, data prepared: {seconds_to_first_step(Path(folder)):.1f} s")


if __name__ == "__main__":
    main()
