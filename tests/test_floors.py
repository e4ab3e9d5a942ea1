"""The house stands: no import runs up a floor or across one, and what one place alone may know stays there."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "muonclip": 0,
    "k2train": 0,  # the version
    "k2train.config": 0,
    "k2train.comm": 0,
    "k2train.lock": 0,
    "k2train.paths": 0,
    "k2train.status": 0,
    "k2train.units": 0,
    "k2train.model": 1,
    "k2train.data": 1,
    "k2train.plan": 1,
    "k2train.checkpoint": 1,
    "k2train.monitor": 1,
    "k2train.train": 2,
    "k2train.export": 2,
    "k2train.generate": 2,
    "k2train.report": 2,
    "k2train.experiments": 3,
    "k2train.doctor": 3,
    "k2train.cli": 4,
    "k2train.__main__": 5,
}
# A library and the modules that may know it.
ONLY_IN = {
    "hydra": ["k2train.cli"],
    "omegaconf": ["k2train.cli"],
    "deepspeed": ["k2train.train"],
    "wandb": ["k2train.train.track_wandb"],
    "tensorboard": ["k2train.train.track_tensorboard"],
    "datasets": ["k2train.data"],
    "submitit": ["k2train.experiments.slurm"],
    "optuna": ["k2train.experiments.search", "k2train.cli.multirun"],
    "transformers": ["k2train.export.check"],
    "optim": [],  # the source root of muonclip: by this name it would be a second MuonClip
}
WITHOUT_TORCH = [
    "k2train.config",
    "k2train.lock",
    "k2train.monitor",
    "k2train.paths",
    "k2train.status",
    "k2train.units",
    "k2train.report",
    "k2train.plan",
    "k2train.export.names",
]


def modules() -> Iterator[tuple[str, Path]]:
    for base, folder in ((ROOT, "k2train"), (ROOT / "optim", "muonclip")):
        for path in sorted((base / folder).rglob("*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imports(text: str, module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: write the whole name"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package(name: str) -> str:
    """The entry of ``FLOORS`` that a module belongs to."""
    parts = name.split(".")
    if parts[0] != "k2train":
        return parts[0]
    two = ".".join(parts[:2])
    return two if two in FLOORS or (ROOT / "k2train" / parts[1]).exists() else "k2train"


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def faults(module: str, text: str) -> list[str]:
    home, found = package(module), []
    for name in imports(text, module):
        target = package(name) if name.split(".")[0] in ("k2train", "muonclip") else None
        if target and target != home and not (target == "k2train" or FLOORS[target] < FLOORS[home]):
            found.append(f"{module} (floor {FLOORS[home]}) imports {name} (floor {FLOORS[target]})")
        for library, knowing in ONLY_IN.items():
            if inside(name, library) and not any(inside(module, one) for one in knowing):
                found.append(f"{module} imports {name}; only {knowing or 'nobody'} may")
        if inside(name, "torch") and any(inside(module, one) for one in WITHOUT_TORCH):
            found.append(f"{module} imports {name}; it must do without torch")
        outside = target is None and name.split(".")[0] not in {"torch", *sys.stdlib_module_names}
        if home == "muonclip" and outside:
            found.append(f"{module} imports {name}; muonclip needs torch and nothing else")
    return found


def test_every_package_has_a_floor():
    assert {package(module) for module, _ in modules()} <= FLOORS.keys()


def test_no_import_runs_up_or_across():
    assert [fault for module, path in modules() for fault in faults(module, path.read_text())] == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("k2train.model.moe", "from k2train.train import trainer"),  # up
        ("k2train.model.moe", "import k2train.data.shards"),  # across
        ("k2train.data.shards", "def f():\n    from k2train import cli"),  # up, inside a function
        ("k2train.config.parse", "import torch.nn"),
        ("k2train.train.engine", "import hydra"),
        ("k2train.cli.train", "import deepspeed"),
        ("muonclip.update", "import numpy"),
        ("muonclip.update", "from k2train import paths"),
        ("k2train.train.engine", "from optim.muonclip import MuonClip"),
    ],
)
def test_a_wrong_import_is_found(module, text):
    assert faults(module, text)


def test_files_are_short():
    long = {str(path): count for _, path in modules() if (count := len(path.read_text().splitlines())) > 500}
    assert not long


def test_there_are_no_stray_packages():
    for folder in ("optim", "configs", "tests", "docs", "launch"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not list((ROOT / "k2train").rglob("utils.py"))
