"""A run that is struck down again and again ends as one that was left alone: its log and its weights, bit for bit.

Two ranks under torchrun with restarts to spare. A strike is a SIGKILL (of a rank, which torchrun starts again; of all
at once, as when a node dies) or a SIGTERM (to a rank alone, or to torchrun, as clusters send it), at a moment drawn at
random: while it starts, in the first step, some steps later, or while a checkpoint is being written. What may be lost
is the steps since the newest checkpoint that was published, and after a SIGTERM nothing at all.

    python -m tests.distributed.soak docs/soak.md     # twenty strikes, some ten minutes
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Of a record: what a clock says.
TIMES = ("tokens_per_second", "elapsed", "seconds", "utilisation", "memory")
TARGETS = ("a rank's SIGKILL", "everyone's SIGKILL", "a rank's SIGTERM", "torchrun's SIGTERM")
MOMENTS = ("at the start", "in the first step", "some steps later", "while saving")
PATIENCE = 600.0  # seconds for anything to happen
# What differs between two optimizers' steps would show: QK-Clip and gradient clipping act. Records span two steps and
# checkpoints an odd number, so that a record's sums are saved half-way.
LIVELY = ("optim.lr=0.01", "optim.tau=0.1", "optim.clip_grad_norm=0.5", "schedule.warmup_steps=2", "track.log_every=2")
LONG = (*LIVELY, "schedule.steps=70", "checkpoint.every=5", "validate.every=9", "parallel.expert_parallel=2")
INTRODUCED = "training tokens"  # ends what a run says of itself before its first step
RECORD = " tokens/s"  # in each line of two steps


@dataclass
class Strike:
    """What happened to the run, and what became of it."""

    target: str
    moment: str
    step: int = 0  # the last one in the log then
    published: int = 0  # step of the newest checkpoint then
    resumed: int | None = None  # where the run went on; None: from the start, or the next strike came before
    said: int = 0  # characters of output until then


@dataclass
class Struck:
    """A run in a folder of its own, with torchrun around it."""

    folder: Path
    corpus: Path
    overrides: Sequence[str]
    restarts: int = 3
    process: subprocess.Popen[str] | None = None

    @property
    def root(self) -> Path:
        return self.folder / "runs" / "soak"

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", str(self.restarts), "-m", "k2train", "train", "experiment=tiny", "name=soak"]
        command += [f"runs_dir={self.folder / 'runs'}", "data=folder", f"data.path={self.corpus}"]
        command += [f"data.cache_dir={self.folder / 'cache'}", "data.tokenizer.vocab_size=512", "track.wandb=off"]
        self.folder.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [*command, "train.threads=1", *self.overrides],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}"},
            cwd=self.folder,
            stdout=open(self.out, "a"),  # noqa: SIM115  (a pipe would block)
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self.process

    def ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def output(self) -> str:
        """All that was said, by torchrun too, over all starts."""
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def starts(self) -> int:
        """How often rank 0 has been started."""
        path = self.root / "logs" / "rank-0.log"
        return path.read_text(errors="replace").count("==== started ") if path.exists() else 0

    def pids(self) -> list[int]:
        """The newest process of each rank."""
        logs = [self.root / "logs" / f"rank-{rank}.log" for rank in range(2)]
        texts = [log.read_text(errors="replace") for log in logs if log.exists()]
        found = [re.findall(r"==== started .* pid (\d+) ====", text) for text in texts]
        return [int(pids[-1]) for pids in found if pids]

    def started(self, *, apart_from: Container[int]) -> bool:
        """Whether both ranks are there and are others than those of an earlier start."""
        pids = self.pids()
        return len(pids) == 2 and all(pid not in apart_from and Path(f"/proc/{pid}").exists() for pid in pids)

    def partials(self) -> set[tuple[str, int]]:
        """Checkpoints that are being written, or whose writing was broken off: names and times."""
        found = set()
        for path in (self.root / "checkpoints").glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def records(self) -> list[dict[str, Any]]:
        path = self.root / "metrics.jsonl"
        if not path.exists():
            return []
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in whole]

    def step(self) -> int:
        return max((record["step"] for record in self.records()), default=0)

    def published(self) -> int:
        found = [re.fullmatch(r"step-(\d+)", path.name) for path in (self.root / "checkpoints").glob("step-*")]
        return max((int(match[1]) for match in found if match), default=0)

    def weights(self) -> dict[str, str]:
        """A hash of each file of tensors of the last checkpoint, which holds weights, momenta and moments."""
        folder = self.root / "checkpoints" / f"step-{self.published():08d}"
        return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}

    def kill(self) -> None:
        """All of it, as when the node dies; torchrun puts each rank in a session of its own."""
        assert self.process is not None
        for pid in [self.process.pid, *_children(self.process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(PATIENCE)


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(word) for word in path.read_text().split()]
    except FileNotFoundError:
        return []


def until(run: Struck, happened: Any) -> bool:
    """Waits for something; False if the run has ended before."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if run.ended():
            return False
        assert time.monotonic() < deadline, f"it did not happen: {run.output()}"
        time.sleep(0.002)
    return True


def strike(run: Struck, blow: Strike, draw: random.Random, *, struck: Container[int]) -> bool:
    """Waits for the moment and strikes; False if the run has ended before. ``struck``: processes that were before."""
    if not until(run, lambda: run.started(apart_from=struck)):
        return False
    logged, introduced, leftover = run.step(), run.output().count(INTRODUCED), run.partials()
    if blow.moment == "at the start":
        time.sleep(draw.uniform(0, 4))
    elif blow.moment == "in the first step":
        if not until(run, lambda: run.output().count(INTRODUCED) > introduced or run.step() > logged):
            return False
        time.sleep(draw.uniform(0, 0.3))
    elif blow.moment == "some steps later":
        told, more = run.output().count(RECORD), draw.randint(1, 2)
        if not until(run, lambda: run.output().count(RECORD) >= told + more):
            return False
    else:
        if not until(run, lambda: run.partials() - leftover):
            return False
        time.sleep(draw.uniform(0, 0.03))
    assert run.process is not None
    blow.step, blow.published, blow.said = run.step(), run.published(), len(run.output())
    if blow.target == "everyone's SIGKILL":
        run.kill()
    elif blow.target == "torchrun's SIGTERM":
        run.process.terminate()
    else:
        signum = signal.SIGKILL if "KILL" in blow.target else signal.SIGTERM
        try:
            os.kill(draw.choice(run.pids()), signum)
        except ProcessLookupError:  # it has just finished
            return False
    return True


def blows(number: int, draw: random.Random) -> list[Strike]:
    """Every target at every moment, then others at random, in any order."""
    pairs = list(itertools.product(TARGETS, MOMENTS))
    pairs += [(draw.choice(TARGETS), draw.choice(MOMENTS)) for _ in range(number - len(pairs))]
    draw.shuffle(pairs)
    return [Strike(target, moment) for target, moment in pairs[:number]]


def soak(run: Struck, planned: Sequence[Strike], draw: random.Random) -> None:
    """Lets the run be struck, started again by torchrun or, where that has ended, by its command, and end."""
    struck: set[int] = set()
    process = run.start()
    for number, blow in enumerate(planned):
        while not strike(run, blow, draw, struck=struck):
            assert process.wait(PATIENCE), f"it ended before strike {number + 1} of {len(planned)}: give it more steps"
            process = run.start()
        struck.update(run.pids())
    for _ in range(2):
        if process.wait(PATIENCE) == 0:
            break
        process = run.start()
    assert process.wait(PATIENCE) == 0, run.output()


def check(run: Struck, planned: Sequence[Strike], alone: Struck) -> None:
    """Fails unless the run ended as the one that was left alone, and lost no more than it may."""
    assert run.records() == alone.records()
    assert run.weights() == alone.weights()
    ends = [blow.said for blow in planned[1:]] + [len(run.output())]
    for blow, end in zip(planned, ends, strict=True):
        said = run.output()[blow.said : end]
        if found := re.search(r"resuming from step (\d+)", said):
            blow.resumed = int(found[1])
            assert blow.resumed >= blow.published
            if saved := re.search(r"stopped by SIGTERM after step (\d+)", said[: found.start()]):
                assert blow.resumed == int(saved[1])


def run_struck(folder: Path, planned: Sequence[Strike], *, seed: int, overrides: Sequence[str]) -> Struck:
    """A run left alone, one that is struck, and the comparison; returns the struck one."""
    corpus = folder / "corpus"
    shutil.copytree(ROOT / "k2train", corpus, ignore=shutil.ignore_patterns("__pycache__"))
    alone, struck = (Struck(folder / name, corpus, overrides) for name in ("alone", "struck"))
    assert alone.start().wait(PATIENCE) == 0, alone.output()
    soak(struck, planned, random.Random(seed))
    check(struck, planned, alone)
    return struck


def measure(folder: Path, *, strikes: int, seed: int, overrides: Sequence[str]) -> tuple[list[Strike], Struck]:
    """So many strikes, drawn at random."""
    planned = blows(strikes, random.Random(seed))
    return planned, run_struck(folder, planned, seed=seed, overrides=overrides)


def table(planned: Sequence[Strike]) -> Iterator[str]:
    """Markdown, a row a strike."""
    yield "| | strike | when | last step logged | newest checkpoint | went on from |"
    yield "| --- " * 6 + "|"
    for number, blow in enumerate(planned, start=1):
        resumed = "struck again before" if blow.resumed is None else blow.resumed
        yield f"| {number} | {blow.target} | {blow.moment} | {blow.step} | {blow.published} | {resumed} |"


def main() -> None:
    """Measures, and writes the table after the mark of a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="whose lines after '<!-- table -->' are replaced")
    parser.add_argument("--strikes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the strikes")
    arguments = parser.parse_args()
    text, mark, _ = arguments.document.read_text().partition("<!-- table -->\n")
    assert mark, f"{arguments.document} has no line <!-- table -->"
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        planned, run = measure(Path(folder), strikes=arguments.strikes, seed=arguments.seed, overrides=LONG)
        records, starts = len(run.records()), run.starts()
    minutes = (time.perf_counter() - begin) / 60
    import torch

    lines = [
        f"{len(planned)} strikes (seed {arguments.seed}) and {starts} starts in {minutes:.0f} minutes; torch "
        f"{torch.__version__}, Python {platform.python_version()}, {platform.machine()}. All {records} records and all "
        "weights, momenta and moments equal those of the run that was left alone, bit for bit.",
        "",
        *table(planned),
    ]
    arguments.document.write_text(text + mark + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
