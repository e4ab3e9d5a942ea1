"""K2's training in the small, with everything that a loop may have beside it."""

import gzip
import json

import pytest


@pytest.mark.full
def test_k2_in_small(runner):
    beside = ("generate.every=10", "profile.steps=[3]", "train.deterministic=true", "track.log_every=2")
    own = ("train.hooks.own.kind=tests.end_to_end.hook.Phases",)
    result = runner.run("phases", "experiment=k2-in-small", "name=phases", *beside, *own)
    assert result.returncode == 0, result.stderr
    assert "YaRN x16" in result.stdout
    assert result.stdout.index("long_context") < result.stdout.index("\nstep ")
    folder = runner.runs / "phases"
    records = [r for r in runner.records("phases") if "loss" in r]
    assert [r["step"] for r in records] == list(range(2, 23, 2))
    assert all(r["steps"] == 2 and r["loss"] < 7 for r in records)
    assert records[-1]["tokens"] == 22 * 512
    phases = (folder / "phases.txt").read_text().splitlines()
    names = ["pretraining"] * 15 + ["annealing"] * 3 + ["long_context"] * 2 + ["yarn"] * 2
    assert phases == [f"{name} True" for name in names]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [10, 20]
    with gzip.open(folder / "profile" / "step-00000003-rank-0.trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    assert (folder / "checkpoints" / "best").exists()
