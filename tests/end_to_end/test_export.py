"""A run that is exported, imported and trained on from, each by one command."""

import json
import subprocess
import sys

import pytest


def k2train(runner, *words):
    command = [sys.executable, "-m", "k2train", *words]
    done = subprocess.run(
        command, env=runner.environment(), cwd=runner.folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_there_and_on(runner):
    done = runner.run("exported", "parallel.zero_stage=2")
    assert done.returncode == 0, done.stderr
    assert "differ by at most" in k2train(runner, "export", "runs/exported", "folder=hf", "dtype=fp32")
    assert "init_from=runs/back name=NAME" in k2train(runner, "import", "hf", "name=back")
    text = k2train(runner, "generate", "hf", "generate.prompt=def ", "generate.max_tokens=8", "device=cpu")
    assert text.startswith("def ")
    assert text == k2train(
        runner, "generate", "runs/exported", "generate.prompt=def ", "generate.max_tokens=8", "device=cpu"
    )

    # experiment=tiny names another model than the import has settings of, which init_from brings along.
    more = runner.run("more", "init_from=runs/back", "schedule.steps=3", "model.router_bias_rate=0.002")
    assert more.returncode == 0, more.stderr
    assert "beginning with the weights of step 0 of runs/back" in more.stdout + more.stderr
    config = json.loads((runner.runs / "more" / "config.json").read_text())
    assert config["model"]["router_bias_rate"] == 0.002
    assert config["data"]["tokenizer"]["kind"] == "json"
    assert runner.losses("more")[1] < runner.losses("exported")[1] - 0.3  # it goes on from what was learnt
    # The same command goes on, even where the start has gone.
    (runner.runs / "back").rename(runner.runs / "gone")
    assert runner.run("more", "init_from=runs/back", "schedule.steps=3", "model.router_bias_rate=0.002").returncode == 0
