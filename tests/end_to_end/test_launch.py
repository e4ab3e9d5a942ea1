"""Runs started by the files of launch/, on one host and on several that are emulated by network namespaces."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SHORT = ("schedule.steps=4", "train.micro_batch_size=2", "validate.every=0", "track.log_every=1")


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def start(runner, command, *overrides, **environment):
    environment = {**runner.environment(), "RESTARTS": "0", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *overrides], env=environment, stdout=pipe, stderr=pipe, text=True)


def ended(process):
    out, error = process.communicate(timeout=400)
    return process.returncode, out + error


def machine(runner, name):
    summary = json.loads((runner.runs / name / "summary.json").read_text())
    return summary["world_size"], summary["steps"]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.full)])
def test_one_host(runner, processes):
    name = f"launched-{processes}"
    process = start(runner, [LAUNCH / "torchrun.sh"], *runner.settings(name, *SHORT), PROCESSES=str(processes))
    status, said = ended(process)
    assert status == 0, said
    assert machine(runner, name) == (processes, 4)
    assert "OMP_NUM_THREADS" not in said


def test_several_hosts_need_a_meeting_point(runner):
    status, said = ended(start(runner, [LAUNCH / "torchrun.sh"], "name=nowhere", NODES="2"))
    assert status != 0
    assert "several hosts need HEAD=host:port" in said


def test_a_wrong_config_is_told_once(runner):
    status, said = ended(
        start(runner, [LAUNCH / "torchrun.sh"], "name=wrong", "optim.lrr=1", PROCESSES="2", RESTARTS="3")
    )
    assert status == 2
    assert said.startswith("k2train: error: unknown key optim.lrr")
    assert said.count("\n") == 1


FAILING = """
import os

from k2train.train.hooks import Hook


class Failing(Hook):
    def before_step(self, step):
        if os.environ["RANK"] == "1":
            raise RuntimeError("the hook is broken")
"""


@pytest.mark.full
def test_the_failing_rank_is_named_first(runner):
    (runner.folder / "failing.py").write_text(FAILING)
    words = runner.settings("names", *SHORT, "train.hooks.own.kind=failing.Failing")
    path = f"{runner.environment()['PYTHONPATH']}:{runner.folder}"
    process = start(runner, [LAUNCH / "torchrun.sh"], *words, PROCESSES="2", PYTHONPATH=path)
    process.stdout.close()
    lines = process.stderr.read().splitlines()
    assert process.wait(60) != 0
    assert "rank 1 failed" in lines[0]
    assert "the hook is broken" in lines[0]


@pytest.mark.full
def test_the_command_of_the_kubernetes_job(runner):
    """Under the variables that Kubeflow's runtime sets, two pods on one host."""
    job = yaml.safe_load((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())
    command, words = job["spec"]["trainer"]["command"], runner.settings("pods", *SHORT)
    common = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "29519"}
    pods = [start(runner, command, *words, **common, PET_NODE_RANK=str(node)) for node in range(2)]
    assert [status for status, _ in map(ended, pods)] == [0, 0]
    assert machine(runner, "pods") == (2, 4)


@pytest.mark.full
def test_deepspeeds_launcher(runner):
    words = runner.settings("by-deepspeed", *SHORT)
    status, said = ended(start(runner, [LAUNCH / "deepspeed.sh"], *words, PROCESSES="2"))
    assert status == 0, said
    assert machine(runner, "by-deepspeed") == (2, 4)


@pytest.fixture
def two_hosts(tmp_path):
    """Commands that run what follows on either of two hosts with a name, an address and a hosts file each."""
    if os.geteuid() or not shutil.which("ip") or subprocess.run(["ip", "netns", "add", "k2train-0"]).returncode:
        pytest.skip("network namespaces cannot be made here")
    names = ["k2train-0", "k2train-1"]
    try:
        subprocess.run(["ip", "netns", "add", names[1]], check=True)
        subprocess.run(["ip", "link", "add", "k2t0", "type", "veth", "peer", "k2t1"], check=True)
        hosts = tmp_path / "hosts"
        hosts.write_text("127.0.0.1 localhost\n10.77.0.1 k2train-0\n10.77.0.2 k2train-1\n")
        for n, name in enumerate(names):
            subprocess.run(["ip", "link", "set", f"k2t{n}", "netns", name], check=True)
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "addr", "add", f"10.77.0.{n + 1}/24", "dev", f"k2t{n}"], check=True)
            for device in ("lo", f"k2t{n}"):
                subprocess.run([*inside, "link", "set", device, "up"], check=True)
        own = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'
        yield [
            ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", own, hosts, name] for name in names
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name])


@pytest.mark.full
def test_two_hosts(runner, two_hosts):
    words = [LAUNCH / "torchrun.sh", *runner.settings("hosts", *SHORT)]
    common = {"NODES": "2", "HEAD": "k2train-0:29400", "PROCESSES": "1"}
    processes = [start(runner, host, *words, **common) for host in two_hosts]
    for status, said in map(ended, processes):
        assert status == 0, said
    assert machine(runner, "hosts") == (2, 4)


AHEAD = "import time; own = time.time; time.time = lambda: own() + 90"
READ_ONLY = ["sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"']


@pytest.mark.full
def test_doctor_names_the_host_with_the_faults(runner, two_hosts, tmp_path):
    """Of the second host the version, the clock, the speed and the disk are wrong."""
    (tmp_path / "sitecustomize.py").write_text(AHEAD)
    (tmp_path / "deepspeed-0.0.1.dist-info").mkdir()
    (tmp_path / "deepspeed-0.0.1.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 0.0.1\n")
    runner.runs.mkdir(exist_ok=True)
    words = [LAUNCH / "torchrun.sh", "doctor", *runner.settings("examined", *SHORT)]
    common = {"NODES": "2", "HEAD": "k2train-0:29400", "PROCESSES": "1"}
    path = f"{tmp_path}:{runner.environment()['PYTHONPATH']}"
    faults = {"PYTHONPATH": path, "MKL_CBWR": "COMPATIBLE"}  # as slow as MKL's oldest code
    sound = start(runner, [*two_hosts[0], *words], **common)
    faulty = start(runner, [*two_hosts[1], *READ_ONLY, runner.runs, *words], **common, **faults)
    (status, said), (other_status, _) = ended(sound), ended(faulty)
    assert (status, other_status) == (1, 1)
    second, lines = "rank 1 (k2train-1)", said.splitlines()
    for about, verdict, sentence in (
        ("versions", "fails", f"deepspeed is 0.0.1 on {second}"),
        ("products", "warning", f"{second} slow"),
        ("clocks", "fails", f"the clock of {second} is +90.0 s off"),
        ("runs_dir", "fails", f"{second} cannot write: {runner.runs}"),
    ):
        line = next(number for number, line in enumerate(lines) if line.startswith(f"{verdict:<8} {about} "))
        assert sentence in lines[line], said
        assert " -> " in lines[line + 1]  # a remedy
    assert not [line for line in lines if line.startswith("fails    data")]
