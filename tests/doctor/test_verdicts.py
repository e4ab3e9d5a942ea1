"""What is judged of findings: each fault is told with its rank."""

import dataclasses

import pytest

from k2train.doctor import verdicts
from k2train.doctor.data import Data
from k2train.doctor.folders import Folder
from k2train.doctor.machine import Machine
from k2train.doctor.network import Network

GOOD = Machine(
    host="host0",
    versions={"python": "3.11.2", "torch": "2.8"},
    device="NVIDIA H100",
    memory=80 << 30,
    free=79 << 30,
    devices=8,
    processes=8,
    shared_memory=8 << 30,
    open_files=65536,
    products=3e14,
)
FOLDER = Folder("/shared/runs", None, (), 1 << 40)
CPU = dataclasses.replace(GOOD, device="CPU")
FAST = dataclasses.replace(FOLDER, written=1e9, read=2e9)
OWN = dataclasses.replace(FOLDER, path="/home/1", unseen=(0,))
RANKS = 4


def with_fault(rank: int, entry, **changes):
    return [dataclasses.replace(entry, **changes) if number == rank else entry for number in range(RANKS)]


def machines(**changes):
    return with_fault(2, GOOD, **changes)


@pytest.mark.parametrize(
    ("verdict", "expected", "said"),
    [
        (verdicts.versions(machines()), "ok", "torch 2.8"),
        (verdicts.versions(machines(versions={"python": "3.11.2", "torch": "2.7"})), "fails", "torch is 2.7 on rank 2"),
        (verdicts.versions(machines(versions={"python": "3.11.2"})), "fails", "torch is missing on rank 2"),
        (verdicts.devices(machines()), "ok", "4 x NVIDIA H100"),
        (verdicts.devices(machines(memory=40 << 30)), "warning", "rank 2 (host0)"),
        (verdicts.devices(machines(free=30 << 30)), "warning", "30 GiB of 80 GiB are free on rank 2"),
        (verdicts.devices(machines(processes=4)), "warning", "4 processes for 8 GPUs: rank 2 (host0)"),
        (verdicts.devices([CPU] * RANKS), "ok", "4 x CPU"),
        (
            verdicts.devices([dataclasses.replace(CPU, devices=4)] * RANKS),
            "warning",
            "8 processes for 4 cores: ranks 0",
        ),
        (verdicts.products(machines()), "ok", "600TFLOP/s"),
        (verdicts.products(machines(products=1e14, host="host1")), "warning", "rank 2 (host1) slow: 200TFLOP/s"),
        (verdicts.shared_memory(machines()), "ok", "8 GiB"),
        (verdicts.shared_memory(machines(shared_memory=64 << 20)), "warning", "64 MiB on rank 2"),
        (verdicts.shared_memory(machines(shared_memory=None)), "warning", "0 B on rank 2"),
        (verdicts.open_files(machines()), "ok", "65,536"),
        (verdicts.open_files(machines(open_files=-1)), "ok", "65,536"),
        (verdicts.open_files(machines(open_files=1024)), "warning", "1024 files may be open on rank 2"),
        (verdicts.open_files(machines(open_files=128)), "fails", "128"),
        (verdicts.network([None], machines()), "ok", "alone"),
        (verdicts.network([Network(1e10, 1e10, 1e10)] * RANKS, machines()), "ok", "all-reduce 9.31 GiB/s"),
        (
            verdicts.network(with_fault(1, Network(1e9, 1e9, 9e9), pair=2e9), machines()),
            "warning",
            "rank 1 (host0) slow",
        ),
        (verdicts.clocks([0, 0.001, -0.002, 0], machines()), "ok", "2.0 ms"),
        (verdicts.clocks([0, 0, 0, 3.0], machines()), "warning", "the clock of rank 3 (host0) is +3.0 s off"),
        (verdicts.clocks([0, -100.0, 0, 0], machines()), "fails", "rank 1"),
        (
            verdicts.folder("runs_dir", with_fault(0, FOLDER, written=1e9, read=2e9), machines()),
            "ok",
            "1 TiB free; 954 MiB/s written, 1.86 GiB/s read",
        ),
        (
            verdicts.folder("runs_dir", [FAST, FOLDER, dataclasses.replace(FAST, read=2e8), FOLDER], machines()),
            "warning",
            "written, rank 2 (host0) slow: 191 MiB/s read, usual 1.86 GiB/s",
        ),
        (verdicts.folder("runs_dir", with_fault(3, FOLDER, fault="no"), machines()), "fails", "rank 3 (host0) cannot"),
        (
            verdicts.folder("runs_dir", with_fault(1, FOLDER, unseen=(0, 2, 3)), machines()),
            "fails",
            "rank 1 (host0) cannot see what rank 0 (host0) wrote to /shared/runs",
        ),
        (
            verdicts.folder(
                "data.cache_dir", [dataclasses.replace(FOLDER, unseen=(1,)), OWN, FOLDER, FOLDER], machines()
            ),
            "fails",
            "rank 1 (host0) cannot see in /home/1 what rank 0 (host0) wrote to /shared/runs",
        ),
        (
            verdicts.folder("runs_dir", [FOLDER] * RANKS, machines(), needed=1 << 41),
            "fails",
            "a checkpoint takes 2 TiB",
        ),
        (verdicts.data([Data(None, "a", 10**9, 9, 3)] * RANKS, machines()), "ok", "12 blocks as prepared"),
        (verdicts.data([Data()] * RANKS, machines()), "warning", "not prepared"),
        (verdicts.data(with_fault(1, Data(None, "a"), fingerprint="b"), machines()), "fails", "rank 1 (host0) read an"),
        (verdicts.data(with_fault(1, Data(None, "a"), fault="gone"), machines()), "fails", "rank 1 (host0): gone"),
    ],
    ids=lambda value: value.said if isinstance(value, verdicts.Verdict) else "",
)
def test_a_fault_is_told_with_its_rank(verdict, expected, said):
    assert verdict.verdict == expected
    assert said in verdict.said
    assert bool(verdict.remedy) == (verdict.verdict != "ok")


def test_many_ranks_are_not_all_named():
    said = verdicts.ranks(range(20), [GOOD] * 20)
    assert said.endswith("7 (host0) and 12 more")
