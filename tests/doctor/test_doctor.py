"""The whole of ``k2train doctor``, on one process and two, with a fault put in."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from k2train.cli.commands import DOCTOR
from k2train.cli.compose import compose
from k2train.comm import close_world, open_world
from k2train.config import RunConfig, parse
from k2train.doctor import examine, folders, machine, network
from k2train.doctor.examine import checkpoint_bytes

ROOT = Path(__file__).parents[2]


def words_of(folder: Path) -> list[str]:
    return [
        "experiment=tiny",
        "data=folder",
        f"data.path={ROOT / 'k2train' / 'doctor'}",
        "data.tokenizer.vocab_size=300",
        f"data.cache_dir={folder / 'cache'}",
        f"runs_dir={folder / 'runs'}",
        "train.device=cpu",
    ]


def k2train(command: str, *words: str, launcher: tuple = ()) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [*(launcher or (sys.executable, "-m", "k2train")), command, *words],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}",
            "PATH": path,
            "PROCESSES": "2",
        },
        capture_output=True,
        text=True,
    )


def test_one_process(tmp_path):
    result = k2train("doctor", *words_of(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    abouts = {line.split("  ")[0].strip(): line for line in lines if not line.startswith(" ")}
    assert abouts.keys() <= {"ok", "warning"}
    assert sum(line.startswith(("ok", "warning", "fails")) for line in lines) == 11
    assert "torch " in result.stdout
    assert "it is not prepared yet" in result.stdout
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.full
def test_by_the_launch_file_on_data_that_is_damaged(tmp_path):
    words = words_of(tmp_path)
    launch = (str(ROOT / "launch" / "torchrun.sh"),)
    assert k2train("prepare", *words).returncode == 0
    result = k2train("doctor", *words, launcher=launch)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all-to-all" in result.stdout
    assert "blocks as prepared" in result.stdout
    (shard,) = (tmp_path / "cache").rglob("train-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    result = k2train("doctor", *words, "train.global_batch_size=7", "train.micro_batch_size=7", launcher=launch)
    assert result.returncode == 1
    assert "does not divide over 2 processes" in result.stdout
    assert f"the shard {shard} is missing or not of" in result.stdout


def _ranks(rank: int, port: int, fault: str, folder: Path) -> None:
    """A rank of two; the second one has the fault."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    words = words_of(folder)
    if rank == 1 and fault == "versions":
        found = machine.versions()
        machine.versions = lambda: found | {"deepspeed": "0.0.1"}
    if rank == 1 and fault == "clocks":
        now = network.now
        network.now = lambda: now() + 90
    if rank == 1 and fault == "products":
        rate = machine.product_rate
        machine.product_rate = lambda device: rate(device) / 50
    if rank == 1 and fault == "runs_dir":
        words = [*words[:-2], f"runs_dir={folder / 'elsewhere'}", words[-1]]
    if rank == 1 and fault == "data.cache_dir":
        (folder / "file").write_text("")
        words[4] = f"data.cache_dir={folder / 'file'}"
    folders.SAMPLE = 2**20
    config = parse(RunConfig, compose(DOCTOR, words))
    found = [[v.about, v.verdict, v.said] for v in examine.examine(config, open_world("cpu"))]
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    close_world()


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "verdict", "said"),
    [
        ("versions", "fails", "deepspeed is 0.0.1 on rank 1"),
        ("clocks", "fails", "is +90.0 s off that of rank 0"),
        ("products", "warning", "rank 1 ("),
        ("runs_dir", "fails", "cannot see in "),
        ("data.cache_dir", "fails", "cannot write"),
    ],
)
def test_two_processes_with_a_fault(tmp_path, fault, verdict, said):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_ranks, args=(port, fault, tmp_path), nprocs=2, start_method="spawn")
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second  # so that all end with the same status
    found = {about: (how, text) for about, how, text in first}
    assert found[fault][0] == verdict
    assert said in found[fault][1]
    assert [about for about, how, _ in first if how == "fails" and about != fault] == []


def counted(name: str) -> int:
    """Bytes that this process has read from disks, or given to them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def test_what_is_read_comes_from_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SAMPLE", 2**23)
    read, wrote = counted("read_bytes"), counted("write_bytes")
    (found,) = folders.probe(tmp_path, open_world("cpu"))
    close_world()
    assert min(found.written, found.read) > 0
    if counted("write_bytes") - wrote < 2**23:
        pytest.skip("there is no disk below this folder")
    assert counted("read_bytes") - read >= 2**23


def test_what_a_checkpoint_takes():
    config = parse(RunConfig, compose(DOCTOR, ["model=k2", "data=prepared", "data.prepared=x"]))
    assert checkpoint_bytes(config) == pytest.approx(8 * 1.026e12, rel=0.01)
