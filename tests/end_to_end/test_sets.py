"""A run on several sources is validated on each of them, and on a set that was prepared apart; so is its checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from k2train.data import open_dataset
from tests.end_to_end.conftest import ROOT


@pytest.mark.full
def test_each_source_and_a_set_prepared_apart(runner):
    def prepare(name: str, *words: str) -> Path:
        words = (f"data.cache_dir={runner.folder / name}", "data.tokenizer.vocab_size=512", *words)
        command = [sys.executable, "-m", "k2train", "prepare", *words]
        subprocess.run(command, check=True, env=runner.environment(), cwd=runner.folder, timeout=300)
        (manifest,) = (runner.folder / name).rglob("manifest.json")
        return manifest

    mixture = ("data=mixture", 'data.sources.library.include=["json/*.py","email/*.py"]')
    dataset = open_dataset(prepare("sources", *mixture, f"data.path={ROOT / 'k2train'}"))
    same = ("data.tokenizer.kind=json", f"data.tokenizer.path={dataset.folder / 'tokenizer.json'}")
    apart = prepare("apart", "data=folder", f"data.path={ROOT / 'optim'}", "data.held_out=0.9", *same)

    own = ("schedule.steps=4", "validate.every=2", "validate.tokens=512", f"validate.data.optimizer={apart.parent}")
    suite = ("validate.questions=24", "validate.samples=1")
    result = runner.run("sets", *mixture, f"data.cache_dir={runner.folder / 'sources'}", *own, *suite)
    assert result.returncode == 0, result.stderr
    records = [record for record in runner.records("sets") if "sets" in record]
    assert [(r["step"], r["whole"]) for r in records] == [(2, False), (4, True)]
    sizes = {name: dataset.tokens("held_out", name) for name in ("library", "own")}
    for record in records:
        sets = record["sets"]
        assert list(sets) == ["library", "own", "optimizer"]
        mean = sum(sets[name]["loss"] * size for name, size in sizes.items()) / sum(sizes.values())
        assert abs(record["validation_loss"] - mean) < 1e-9
        assert all(0 < found["bits_per_byte"] < 9 for found in sets.values())

    assert json.loads((runner.runs / "sets" / "summary.json").read_text())["sets"] == sets
    said = " ".join(result.stdout.split())
    assert f"(loss {record['validation_loss']:.4f}): library {sets['library']['bits_per_byte']:.4f}, own " in said
    assert f"optimizer {sets['optimizer']['loss']:.4f}, {sets['optimizer']['bits_per_byte']:.4f} bits per byte" in said

    command = [sys.executable, "-m", "k2train", "evaluate", "runs/sets", "--json", "questions=24", "samples=0"]
    done = subprocess.run(
        command, check=True, env=runner.environment(), cwd=runner.folder, timeout=300, capture_output=True, text=True
    )
    evaluated = json.loads(done.stdout)
    assert evaluated["loss"] == pytest.approx(record["validation_loss"], rel=1e-6)
    assert evaluated["bits_per_byte"] == pytest.approx(record["validation_bits_per_byte"], rel=1e-6)
    assert evaluated["tokens"] == sum(sizes.values())
    for name, expected in sets.items():
        assert {key: evaluated["sets"][name][key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert evaluated["next_line_accuracy"] == record["next_line_accuracy"]
    assert 12 <= evaluated["questions"] <= 24  # a piece may have no line to ask for
