"""What a wheel carries: both packages, the configs, the marks for type checkers."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_has_the_configs_and_both_packages(wheel):
    names = set(wheel.namelist())
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"k2train/{name}" for name in shipped} <= names
    assert {f"k2train/report/page.{ending}" for ending in ("html", "css", "js")} <= names
    assert {"k2train/py.typed", "muonclip/py.typed", "k2train/__main__.py", "muonclip/__init__.py"} <= names


def test_wheel_has_nothing_else(wheel):
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == {"k2train", "muonclip"}


def test_muonclip_alone_needs_torch_alone(wheel):
    metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("METADATA"))
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [re.match(r"Requires-Dist: ([\w-]+)", line)[1] for line in needed] == ["torch"]


def test_configs_are_found_in_an_unpacked_wheel(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "from k2train.cli import main; main(['train', '--help'])"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert str(tmp_path) in found
    assert "moonlight-16b" in found
