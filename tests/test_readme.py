"""The commands of the README run as printed; only sizes are made smaller by overrides that are appended."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.how_to.page import environment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines() if line
]
SMALL = {
    "train": [
        *("schedule.steps=2", "schedule.warmup_steps=1", "validate.tokens=256", "generate.max_tokens=4", "track=off"),
        *("train.sequence_length=32", "train.global_batch_size=4", "train.micro_batch_size=2", "train.threads=1"),
        *("model.num_hidden_layers=2", "model.n_routed_experts=4", "model.hidden_size=32"),
        "data.tokenizer.vocab_size=512",
    ],
    "generate": ["generate.max_tokens=4"],
}
SMALL["audit"] = SMALL["train"]
SMALL["show"] = ["data.tokenizer.vocab_size=512"]
SMALL |= {"inspect": [], "verify": [], "trace": [], "plan": []}
SAID = {
    "train": "this model",
    "generate": "def main(",
    "audit": "updated as it should be",
    "show": "held out",
    "inspect": "any other can read it",
    "verify": "is whole: ",
    "trace": "sample 0: source ",
    "plan": "ways of splitting it",
}
# Some text of its own, and a part of the standard library: a corpus of a second.
CORPUS = {
    True: [f"data.path={ROOT / 'k2train' / 'config'}"],
    False: ["data.sources.stdlib.include=[json/*.py,email/*.py]"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


def test_all_kinds_of_commands_are_there():
    assert {kind for kind in SMALL if any(f" {kind} " in line for line in COMMANDS)} == set(SMALL)
    assert any(line.startswith("torchrun ") for line in COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)  # in the order of the README: generate speaks with what was trained
def test_command(line, home):
    words = shlex.split(line)
    kind = next(word for word in words if word in SMALL)
    words += SMALL[kind]
    if kind in ("train", "audit", "show"):
        words += CORPUS["data=folder" in words]
    found = subprocess.run(
        words, cwd=home, env=environment(home), capture_output=True, text=True, timeout=200, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stderr == ""
    assert SAID[kind] in found.stdout
