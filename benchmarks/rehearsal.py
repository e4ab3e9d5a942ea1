"""What it takes to play one rank of Kimi K2's training on 1024 and on 2048 GPUs.

    python benchmarks/rehearsal.py

The bars, on an idle core: 60 s and 4 GB. Seconds of the processor tell the same on a busy one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

NODES = 128, 256  # of eight H800
RANK = 777


def main() -> None:
    """Prints seconds of the wall and of the processor, and the largest memory of the process."""
    for nodes in NODES:
        words = ["experiment=k2", "cluster=h800", f"cluster.nodes={nodes}", f"rank={RANK}"]
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "k2train", "rehearse", *words], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        assert os.waitstatus_to_exitcode(status) == 0
        print(
            f"{8 * nodes} GPUs: {seconds:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of the processor, "
            f"{used.ru_maxrss * 1024 / 1e9:.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
