"""``k2train reproduce`` from the command to the verdict."""

import csv
import json
import xml.etree.ElementTree as ET

import pytest

from k2train.cli import main
from k2train.experiments.reproductions import heads


def test_an_unknown_name_is_told_the_names(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "logit"])
    assert ended.value.code == 2
    assert "logits" in capsys.readouterr().err


@pytest.mark.full
def test_a_whole_reproduction_in_runs_of_a_few_steps(tmp_path, capsys):
    words = ["reproduce", "heads", "--quick", "--jobs", "2", "--runs-dir", str(tmp_path)]
    small = ["schedule.steps=4", "schedule.warmup_steps=1", "train.sequence_length=32", "generate.max_tokens=1"]
    assert main([*words, *small]) == 0
    folder, said = tmp_path / "heads-quick", capsys.readouterr().out
    assert "[6/6, " in said
    assert str(folder / "verdict.md") in said
    runs = list(csv.DictReader((folder / "runs.csv").open()))
    assert [(run["model.num_attention_heads"], run["seed"]) for run in runs] == [
        (heads_, seed) for heads_ in ("4", "8") for seed in "123"
    ]
    summaries = {json.loads(path.read_text())["validation_loss"] for path in folder.glob("runs/*/summary.json")}
    assert {float(run["validation_loss"]) for run in runs} == summaries
    page = (folder / "verdict.md").read_text()
    losses = [float(run["validation_loss"]) for run in runs]
    gains = [100 * (1 - many / few) for few, many in zip(losses[:3], losses[3:], strict=True)]
    assert f"| {heads.GAIN} <= 1.2 | {' | '.join(f'{gain:.4g}' for gain in gains)} |" in page
    ET.parse(folder / "figure.svg")
    assert main([*words, *small]) == 0
    assert "6 of 6 runs are finished" in capsys.readouterr().out


@pytest.mark.full
def test_there_is_no_verdict_without_all_runs(tmp_path, capsys):
    words = ["reproduce", "heads", "--quick", "--jobs", "2", "--runs-dir", str(tmp_path)]
    assert main([*words, "schedule.steps=2"]) == 1  # shorter than its warm-up
    assert "6 of 6 runs are not finished" in capsys.readouterr().err
    assert not (tmp_path / "heads-quick" / "verdict.md").exists()
