"""Models that are no K2 go through the same commands: grouped-query attention, and no experts at all."""

import subprocess

import pytest

SHORT = ["model.num_hidden_layers=2", "train.sequence_length=32", "schedule.steps=4", "schedule.warmup_steps=1"]
SHORT += ["generate.max_tokens=2", "validate.every=2", "validate.tokens=64", "checkpoint.every=2", "optim.tau=0.01"]


def audit(runner, *words: str) -> str:
    command = runner.command("audit", *words)
    command[command.index("train")] = "audit"
    result = subprocess.run(
        command, env=runner.environment(), cwd=runner.folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def test_grouped_queries(runner):
    told = audit(runner, "model=small-gqa", *SHORT)
    assert "8 of 8 heads clipped" in told
    assert told.endswith("each updated as it should be, once")


@pytest.mark.full
def test_without_experts(runner):
    words = ["model=small-dense", "model.first_k_dense_replace=2", *SHORT]
    result = runner.run("dense", *words)
    assert result.returncode == 0, result.stderr
    losses = runner.losses("dense")
    assert list(losses) == [1, 2, 3, 4]
    assert losses[4] < losses[1]
    assert runner.records("dense")[0]["clipped_heads"] == 8
    assert audit(runner, *words).endswith("each updated as it should be, once")
