"""Real runs of the command line on a small corpus: this project's own source."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Runner:
    """Starts ``k2train train`` as a person would, in folders of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"

    def settings(self, name: str, *overrides: str) -> list[str]:
        """What follows ``k2train train``."""
        own = [f"name={name}", f"runs_dir={self.runs}", "data=folder", f"data.path={ROOT / 'k2train'}"]
        own += [f"data.cache_dir={self.folder / 'cache'}", "data.tokenizer.vocab_size=512", "track.wandb=off"]
        own += ["train.threads=1"]  # other tests run at the same time
        return ["experiment=tiny", *own, *overrides]

    def command(self, name: str, *overrides: str, processes: int = 1) -> list[str]:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        return [*launcher, "-m", "k2train", "train", *self.settings(name, *overrides)]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}"}

    def start(self, name: str, *overrides: str, processes: int = 1) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(name, *overrides, processes=processes),
            env=self.environment(),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, name: str, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess:
        """To the end; whether it went well is for the caller to ask."""
        process = self.start(name, *overrides, processes=processes)
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"{name} hangs; so far it said:\n{out}\n{err}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def records(self, name: str) -> list[dict]:
        path = self.runs / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def losses(self, name: str) -> dict[int, float]:
        return {r["step"]: r["loss"] for r in self.records(name) if "loss" in r}


@pytest.fixture(scope="session")
def runner(tmp_path_factory) -> Runner:
    return Runner(tmp_path_factory.mktemp("end_to_end"))


class SmallDisk:
    """A file system in memory of 2 MB, or of as much as it is resized to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)


@pytest.fixture
def small_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "k2train", tmp_path]
    if not shutil.which("mount") or subprocess.run(mount).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield SmallDisk(tmp_path)
    subprocess.run(["umount", "-l", tmp_path], check=True)
