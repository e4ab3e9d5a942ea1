"""``k2train scale`` on folders of sweeps, whose runs are written here."""

import json
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from k2train.cli import main
from k2train.cli.multirun import run_config
from k2train.config import leaves, to_dict
from k2train.experiments.scaling.runs import as_csv, read_runs, size_of
from k2train.plan.count import parameters, total

WIDTHS = (24, 48, 96, 144)
STEPS = (100, 200, 400)
VOCABULARY = 320  # of bytes, as the tokenizer pads it


def shape(width):
    return {"hidden_size": width, "num_attention_heads": width // 24, "q_lora_rank": width // 2}


def words(width, steps):
    return [
        "experiment=mini",
        *(f"model.{key}={value}" for key, value in shape(width).items()),
        f"schedule.steps={steps}",
    ]


def true_loss(model, steps):
    size = size_of(replace(model, vocab_size=VOCABULARY), length=128)
    return 1 + 40 / size.active**0.4 + 20 / steps**0.6


@pytest.fixture(scope="module")
def mini():
    return run_config(["experiment=mini"])


@pytest.fixture(scope="module")
def sweep(mini, tmp_path_factory):
    """Finished runs but one."""
    folder = tmp_path_factory.mktemp("sizes")
    for width in WIDTHS:
        model = replace(mini.model, **shape(width))
        size = total(parameters(replace(model, vocab_size=VOCABULARY)))
        for steps in STEPS:
            for lr, more in ((0.005, 0.02), (0.01, 0.0), (0.02, 0.03)):
                optim, schedule = replace(mini.optim, lr=lr), replace(mini.schedule, steps=steps)
                config = to_dict(replace(mini, model=model, optim=optim, schedule=schedule))
                loss = true_loss(model, steps) + more
                results = {"tokens": steps * 1024, "validation_loss": loss, "parameters_total": size}
                trial = {"overrides": words(width, steps), "settings": dict(leaves(config)), "failure": None}
                run = folder / f"{width:03}-{steps}-{lr}"
                run.mkdir()
                for name, content in (("config", config), ("trial", trial), ("summary", results)):
                    (run / f"{name}.json").write_text(json.dumps(content))
    (folder / "024-100-0.005" / "summary.json").unlink()
    return folder


def test_runs_are_read_from_a_sweep(mini, sweep):
    runs, unfinished = read_runs([sweep])
    assert (len(runs), unfinished) == (35, 1)
    run = runs[-1]
    assert (run.vocabulary, run.tokens, run.batch, run.lr, run.seed, run.others) == (
        VOCABULARY,
        409600,
        1024,
        0.02,
        0,
        "",
    )
    size = total(parameters(replace(mini.model, **shape(144), vocab_size=VOCABULARY)))
    assert run.size.total == size - 2 * VOCABULARY * 144
    assert run.size.active < run.size.total


def test_settings_that_differ_at_one_size_are_no_seeds(sweep, tmp_path):
    for name, spread in (("a", 0.02), ("b", 0.01)):
        shutil.copytree(sweep / "096-400-0.01", tmp_path / name)
        trial = json.loads((tmp_path / name / "trial.json").read_text())
        trial["settings"]["model.initializer_range"] = spread
        (tmp_path / name / "trial.json").write_text(json.dumps(trial))
    assert {run.others for run in read_runs([sweep])[0]} == {""}
    assert [run.others for run in read_runs([tmp_path])[0]] == [
        f"model.initializer_range={spread}" for spread in (0.02, 0.01)
    ]


def test_a_target_is_foretold_and_files_are_written(mini, sweep, tmp_path, capsys):
    target = words(192, 800)
    assert main(["scale", str(sweep), "--folder", str(tmp_path), "--target", *target]) == 0
    said = capsys.readouterr().out
    assert "left out: 1 runs that are not finished" in said
    assert "L(N, D) = E + A / N^a + B / D^b" in said
    assert "target: " in said
    found = json.loads((tmp_path / "scale.json").read_text())
    assert found["forecast"]["point"]["D"] == 800 * 8 * 128
    assert found["forecast"]["loss"] == pytest.approx(true_loss(replace(mini.model, **shape(192)), 800), rel=1e-3)
    assert found["backtest"]["outcome"] == "holds"
    assert found["cells"][1]["lr"]["place"] == "inside"
    ET.parse(tmp_path / "scale.svg")
    assert main(["scale", str(tmp_path / "scale.csv"), "--target", *target]) == 0
    again = json.loads((tmp_path / "scale.json").read_text())
    assert again == found


def test_a_target_on_other_text_is_refused(sweep, tmp_path, capsys):
    target = ["experiment=mini", "train.sequence_length=256"]
    assert main(["scale", str(sweep), "--folder", str(tmp_path), "--target", *target]) == 1
    assert "the target's text is another than the sweep's" in capsys.readouterr().err


def test_a_target_of_more_tokens_than_the_sweep_knows_is_refused(sweep, tmp_path, capsys):
    runs = [run for run in read_runs([sweep])[0] if run.tokens == STEPS[1] * 1024]
    (tmp_path / "runs.csv").write_text(as_csv(runs))
    assert main(["scale", str(tmp_path / "runs.csv"), "--target", *words(192, 800)]) == 1
    assert "819200 tokens where the sweep has about 204800" in capsys.readouterr().err


def test_a_folder_without_finished_runs(tmp_path, capsys):
    assert main(["scale", str(tmp_path)]) == 1
    assert "no finished run of a sweep" in capsys.readouterr().err
