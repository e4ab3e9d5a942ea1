"""The SLURM script under SLURM itself: a cluster of two nodes on this machine, where its programs are installed."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SYSTEM = f"/usr/sbin:{os.environ['PATH']}"
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17100-17101] CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        bool(os.geteuid()) or not all(shutil.which(program, path=SYSTEM) for program in PROGRAMS),
        reason="needs root, and SLURM: apt-get install slurm-wlm",
    ),
]


class Slurm:
    """A cluster in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname(), folder=folder))
        (folder / "hosts").write_text(Path("/etc/hosts").read_text() + "\n127.0.0.1 n0 n1\n")
        tools = Path(sys.executable).parent
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{tools}:{SYSTEM}"}
        # Nodes find each other by name.
        named = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', folder / "hosts"]
        daemons = (["munged", "--force", "--foreground"], ["slurmctld", "-D"], ["slurmd", "-DNn0"], ["slurmd", "-DNn1"])
        self.daemons = [
            subprocess.Popen([*named, *daemon], env=self.environment, stderr=subprocess.DEVNULL) for daemon in daemons
        ]

    def ready(self) -> bool:
        told = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=self.environment, capture_output=True)
        return told.stdout.split() == [b"idle"]

    def stop(self) -> None:
        self.call("scancel", "--user=root")
        until(lambda: not self.call("squeue", "--noheader"))
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait()

    def call(self, *command, **environment) -> str:
        environment = {**self.environment, **environment}
        return subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    def submit(self, *words, **environment) -> str:
        return self.call("sbatch", "--parsable", f"--output={self.folder}/%j.log", *words, **environment).strip()

    def state(self, job: str) -> set[str]:
        """Of the job's parts; none once it has ended."""
        queue = [line.split() for line in self.call("squeue", "--noheader", "--array", "--format=%F %T").splitlines()]
        return {state for number, state in queue if number == job}


def until(true, *, within=400):
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        until(cluster.ready, within=30)
        yield cluster
    finally:
        cluster.stop()


def test_two_nodes_until_the_time_limit_and_then_to_the_end(runner, slurm):
    settings = runner.settings("requeued", "schedule.steps=60", "validate.every=0", "track.log_every=1")
    job = slurm.submit("--nodes=2", "launch/slurm.sbatch", *settings, **runner.environment() | slurm.environment)
    until(lambda: len(runner.losses("requeued")) >= 5)
    slurm.call("scancel", "--signal=USR1", "--batch", job)  # what SLURM does before the time limit
    until(lambda: slurm.state(job) == {"PENDING"})
    assert 5 <= len(runner.losses("requeued")) < 60
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # it would wait for two minutes
    until(lambda: not slurm.state(job))
    assert [*runner.losses("requeued")] == list(range(1, 61))
    assert "stopped by SIGUSR1" in (slurm.folder / f"{job}.log").read_text()


def test_a_sweep_as_an_array(runner, slurm):
    runs = runner.folder / "runs.txt"
    runs.write_text("name=array-1 seed=1\nname=array-2 seed=2\n")
    common = runner.settings("to-be-named", "schedule.steps=4", "validate.every=0")
    environment = {**runner.environment(), **slurm.environment, "RUNS": str(runs)}
    job = slurm.submit("--array=1-2%1", "launch/slurm.sbatch", *common, **environment)
    until(lambda: not slurm.state(job))
    assert all((runner.runs / name / "summary.json").exists() for name in ("array-1", "array-2"))


def test_a_sweep_by_submitit_outlives_who_submitted_it_and_its_time_limit(runner, slurm):
    words = runner.settings("submitted", "validate.every=0", "track.log_every=1", "schedule.steps=60", "seed=1,2")
    command = [sys.executable, "-m", "k2train", "train", "--multirun", "--jobs=2", "--slurm", "time=20", *words]
    environment = {**runner.environment(), **slurm.environment}
    folder = runner.runs / "submitted"
    submitter = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    until(lambda: len(list(folder.glob("*/metrics.jsonl"))) == 2)
    submitter.kill()
    submitter.wait()
    job = next(folder.glob("*/slurm_job")).read_text().strip()
    slurm.call("scancel", "--signal=USR2", job)  # what SLURM does before the time limit
    until(lambda: f"{job} PENDING" in slurm.call("squeue", "--noheader", "--array", "--format=%i %T").splitlines())
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # it would wait for two minutes
    said = slurm.call(*command, **runner.environment())
    assert "[2/2, " in said
    assert len(list(folder.glob("*/summary.json"))) == 2
    assert len(list((folder / "slurm").glob("*_submitted.pkl"))) == 2  # neither was submitted again
    assert not list(folder.glob("*/slurm_job"))
