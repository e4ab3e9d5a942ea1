"""``k2train data trace`` names the documents and the text of a step, from the run's config and data alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from k2train.cli import main
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import RunConfig, parse, to_dict


@pytest.fixture
def run(tmp_path: Path) -> Path:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(8):
        (corpus / f"text{number}.py").write_text(f"def name{number}():\n    return {number}\n" * 40)
    words = ["experiment=tiny", "data=folder", f"data.path={corpus}", f"data.cache_dir={tmp_path / 'cache'}"]
    words += ["data.held_out=0.3", "data.tokenizer.vocab_size=300", "train.sequence_length=32"]
    words += ["train.global_batch_size=8", "train.micro_batch_size=2", "name=traced"]
    folder = tmp_path / "traced"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(parse(RunConfig, compose(TRAIN, words)))))
    return folder


def trace(capsys, *words: str) -> str:
    assert main(["data", "trace", *words]) == 0
    return capsys.readouterr().out


def samples(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("sample ")]


def test_a_step_names_its_documents_and_their_text(run, capsys):
    text = trace(capsys, str(run), "--step", "3")
    assert [line.split(":")[0] for line in samples(text)] == [f"sample {n}" for n in range(16, 24)]
    assert "source folder, epoch 0, window" in text
    assert "train-00000.safetensors)" in text
    assert "text" in text
    assert "    return " in text


def test_a_rank_has_its_part_of_the_step(run, capsys):
    whole = trace(capsys, str(run), "--step", "1")
    parts = [trace(capsys, str(run), "--step", "1", "--rank", str(r), "--processes", "2") for r in (0, 1)]
    assert [[line.split(":")[0].split()[1] for line in samples(part)] for part in parts] == [
        ["0", "1", "4", "5"],
        ["2", "3", "6", "7"],
    ]
    assert sorted(samples(whole)) == sorted(line for part in parts for line in samples(part))


def test_it_needs_neither_deepspeed_nor_a_process_group(run):
    code = (
        "import sys, torch; from k2train.cli import main; "
        f"assert main(['data', 'trace', {str(run)!r}, '--step', '1']) == 0; "
        "assert 'deepspeed' not in sys.modules and not torch.distributed.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "0"], "--step 0: the run traced has the steps 1 to "),
        (["--step", "1", "--rank", "2", "--processes", "2"], "--rank 2: the run had 2 processes, 0 to 1"),
        (["--step", "1", "--rank", "0"], "has no checkpoint that says how many processes there were: --processes N"),
    ],
)
def test_what_cannot_be_traced_is_one_sentence(run, capsys, words, message):
    assert main(["data", "trace", str(run), *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert main(["data", "trace", str(tmp_path), "--step", "1"]) == 1
    assert "is no run: it has no config.json; give the folder of one" in capsys.readouterr().err
