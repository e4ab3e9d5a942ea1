"""The launch files as their own linters and schemas see them; tests/end_to_end/test_launch.py runs them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api import models

LAUNCH = Path(__file__).parents[2] / "launch"
TOOLS = Path(sys.executable).parent
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell(script):
    checked = subprocess.run([TOOLS / "shellcheck", script], capture_output=True)
    assert checked.returncode == 0, checked.stdout.decode()


def test_dockerfile():
    checked = subprocess.run([TOOLS / "hadolint", LAUNCH / "Dockerfile"], capture_output=True)
    assert checked.returncode == 0, checked.stdout.decode()


@pytest.mark.parametrize(
    ("name", "kind"), [("runtime", models.TrainerV1alpha1TrainingRuntime), ("trainjob", models.TrainerV1alpha1TrainJob)]
)
def test_kubernetes(name, kind):
    """Kubeflow's own model of the resource: a wrong value is refused, and an unknown key does not come back."""
    written = yaml.safe_load((LAUNCH / "kubernetes" / f"{name}.yaml").read_text())
    assert kind.from_dict(written).to_dict() == written


def test_the_job_names_what_the_runtime_has():
    runtime = yaml.safe_load((LAUNCH / "kubernetes" / "runtime.yaml").read_text())
    job = yaml.safe_load((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_no_file_holds_a_hyperparameter():
    """What is trained is said on the command line and in configs/; examples in comments are not read by anything."""
    for path in SCRIPTS:
        code = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert not [line for line in code if "optim." in line or "model=" in line or "schedule." in line]
