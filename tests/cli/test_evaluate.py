"""``k2train evaluate``: what it is given, what it refuses, what it shows. Numbers of real runs: tests/end_to_end."""

import json
from pathlib import Path

import pytest
from small_run import export, write_run

from k2train.cli import main
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import DataConfig, RunConfig, parse
from k2train.data import prepare


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run, its export, and data sets by the run's tokenizer and by another."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = parse(RunConfig, compose(TRAIN, ["experiment=tiny", "model.vocab_size=320"])).model
    write_run(folder / "run", model)
    export(folder / "run", folder / "hf")
    for number in range(8):
        path = folder / "text" / str(number) / "text.py"
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"v{n} = read({n * number})\n" for n in range(60)))
    own = ("data.tokenizer.kind=json", f"data.tokenizer.path={folder / 'run' / 'tokenizer.json'}")
    for name, tokenizer in (("same", own), ("other", ("data.tokenizer.kind=bytes",))):
        words = ("data=folder", f"data.path={folder / 'text'}", "data.held_out=0.3", "data.workers=1", *tokenizer)
        config = parse(DataConfig, compose(TRAIN, words)["data"])
        manifest = prepare(config, cache=folder / "cache" / name, progress=lambda *_: None)
        (folder / name).symlink_to(manifest.parent)
    return folder


def evaluate(*words):
    return main(["evaluate", "device=cpu", "samples=0", *map(str, words)])


def found(capsys, *words):
    assert evaluate(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_and_its_export_score_the_same(home, capsys):
    given = (f"data={home / 'same'}", "sequence_length=128", "questions=16")
    run, exported = found(capsys, home / "run", *given), found(capsys, home / "hf", *given)
    assert run["loss"] == exported["loss"]
    assert run["next_line_accuracy"] == exported["next_line_accuracy"]
    assert run["questions"] >= 4
    train = found(capsys, home / "run", *given, "split=train", "questions=0")
    assert train["tokens"] != run["tokens"]
    assert train["loss"] != run["loss"]
    few = found(capsys, home / "run", *given, "tokens=100", "questions=0")
    assert few["loss"] != run["loss"]
    assert few["loss"] == pytest.approx(run["loss"], rel=0.1)
    assert evaluate(home / "run", *given, "tokens=100", "questions=0") == 0
    assert "in windows of 128 tokens, 100 tokens of each text\n" in capsys.readouterr().out


def test_what_a_person_sees(home, capsys):
    words = (f"data={home / 'same'}", "sequence_length=128", "questions=8", "generate.max_tokens=8", "samples=1")
    assert evaluate(home / "run", *words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "held_out, in windows of 128 tokens" in out
    assert "tokens of each text" not in out
    assert "bits per byte" in out
    assert "questions; chance 0.25" in out
    assert "of the lines of 1 texts" in out


def test_tasks_are_written_once(home, capsys, tmp_path):
    words = (home / "run", f"data={home / 'same'}", "sequence_length=128", "questions=8", f"tasks={tmp_path / 'tasks'}")
    asked = found(capsys, *words)["questions"]
    task = json.loads((tmp_path / "tasks" / "k2train_next_line.yaml").read_text())
    (lines,) = task["dataset_kwargs"]["data_files"].values()
    questions = [json.loads(line) for line in Path(lines).read_text().splitlines()]
    assert len(questions) == asked
    assert {len(question["answers"]) for question in questions} == {4}
    assert evaluate(*words) == 1
    assert "tasks: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "data=other"], "data=other was encoded by another tokenizer"),
        (["hf", "data=same"], "does not say what it was trained on: give both data and sequence_length"),
        (["hf", "sequence_length=64"], "does not say what it was trained on"),
        (["text", "data=same"], "holds no checkpoint"),
    ],
)
def test_what_is_refused(home, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(home)
    assert evaluate(*words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("k2train: error: ")
    assert sentence in err
    assert err.count("\n") == 1
