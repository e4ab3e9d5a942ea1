"""What is answered before anything runs."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

import k2train
from k2train.cli import main


def errors(capsys) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(line.startswith("k2train: error: ") for line in lines)
    return [line.removeprefix("k2train: error: ") for line in lines]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_general_help(words, capsys):
    assert main(words) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("prepare", "train", "generate", "macOS", "Windows"))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"k2train {k2train.__version__}\n"


@pytest.mark.parametrize(("typed", "hint"), [("trian", "did you mean 'train'?"), ("xxx", "the commands are prepare")])
def test_unknown_command(typed, hint, capsys):
    assert main([typed]) == 2
    assert hint in errors(capsys)[0]


def test_threads_sleep_soon_unless_the_person_says_otherwise(monkeypatch):
    seen = []
    monkeypatch.setattr("k2train.cli.prepare.run", lambda config: seen.append(os.environ["GOMP_SPINCOUNT"]) or 0)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert main(["prepare"]) == 0
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert main(["prepare"]) == 0
    assert seen == ["2000", "7"]


@pytest.mark.parametrize("name", ["prepare", "train", "generate"])
def test_command_help_fits_a_terminal(name, capsys):
    assert main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"k2train {name}: ")
    assert max(map(len, lines[:-1])) <= 120  # the last one names a folder


def test_train_help_lists_groups_and_ten_overrides(capsys):
    main(["train", "--help"])
    text = capsys.readouterr().out
    for option in (
        "moonlight-16b",
        "folder, hub, jsonl, mixture, own, prepared, stdlib",
        "adamw, muon, muonclip, own",
        "constant, cosine, k2, linear, wsd",
        "tiny",
    ):
        assert option in text
    table = text.split("Overrides people need most:\n")[1].split("\n\n")[0]
    assert len(table.splitlines()) == 10


def test_own_options_are_listed(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    main(["train", "--help", "--config-dir", str(tmp_path)])
    assert " mine, " in capsys.readouterr().out


def test_all_faults_are_told_at_once(capsys):
    words = ["optim.lrr=1", "modle=nano", "model=nan", "experiment=tny", "train.threads=1,2", "fast", "seed", "+seed=1"]
    assert main(["train", *words]) == 2
    assert errors(capsys) == [
        "unknown key optim.lrr: did you mean optim.lr?",
        "unknown key modle: did you mean model?",
        "model=nan: there is no such option: did you mean model=nano?",
        "experiment=tny: there is no such option: did you mean experiment=tiny?",
        "train.threads=1,2: give one value; a list is written [a,b], and --multirun makes several runs",
        "'fast' is no override: write key=value, as in name=NAME",
        "seed lacks a value: write seed=VALUE",
        "+seed=1: keys can be set, not added or removed: write key=value without '+'",
    ]


def test_bad_values_name_the_rule(capsys):
    assert main(["train", "train.micro_batch_size=3", "parallel.zero_stage=7"]) == 2
    assert errors(capsys) == ["parallel.zero_stage=7 must be at most 3"]
    assert main(["train", "train.micro_batch_size=3"]) == 2
    assert "must be a multiple of train.micro_batch_size=3" in errors(capsys)[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--hlep"], "--hlep is no option: did you mean --help?"),
        (["--cfg", "all"], "--cfg all: write `--cfg job`"),
        (["--config-dir", "/no/such/folder"], "--config-dir /no/such/folder: it is no folder"),
        (["--config-dir"], "--config-dir : it is no folder"),
    ],
)
def test_wrong_options(words, sentence, capsys):
    assert main(["train", *words]) == 2
    assert sentence in errors(capsys)[0]


def test_only_the_first_rank_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "sed=1"]) == 2
    assert errors(capsys) == []


def test_cfg_job_prints_the_composed_config(capsys):
    assert main(["train", "experiment=tiny", "seed=5", "optim.lr=0.25", "--cfg", "job"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["seed"], config["name"], config["optim"]["roles"]["head"]["lr"]) == (5, "tiny", 0.25)


def test_cfg_job_prints_a_config_that_is_wrong_too(capsys):
    assert main(["train", "seed=-5", "--cfg=job"]) == 2
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["seed"] == -5
    assert err == "k2train: error: seed=-5 must be at least 0\n"


def run_with(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "k2train.cli.train", SimpleNamespace(run=run))
    return main(["train", "experiment=tiny"])


def test_a_refused_write_is_a_sentence(monkeypatch, capsys):
    def run(config):
        raise PermissionError(13, "Permission denied", "/runs")

    assert run_with(monkeypatch, run) == 1
    assert errors(capsys)[0].startswith("/runs: there is no permission")


def test_ctrl_c_is_a_sentence(monkeypatch, capsys):
    def run(config):
        raise KeyboardInterrupt

    assert run_with(monkeypatch, run) == 130
    assert "the same command goes on" in errors(capsys)[0]


def test_a_reader_that_has_had_enough_ends_it_without_a_word():
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-u", "-m", "k2train", "train", "--help"]
    result = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train"]) == 2
    assert "pip install 'k2train[train]'" in errors(capsys)[0]
    assert main([]) == 0
    assert "pip install 'k2train[train]'" in capsys.readouterr().out


def test_windows_is_told_what_works(monkeypatch, capsys):
    monkeypatch.setattr("sys.platform", "win32")
    assert main(["train"]) == 2
    assert "WSL 2" in errors(capsys)[0]


def modules_after(*commands: list[str]) -> set[str]:
    calls = "; ".join(f"main({words})" for words in commands)
    code = f"import sys; from k2train.cli import main; {calls}; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in result.stdout.splitlines()}


def test_help_imports_nothing_heavy():
    loaded = modules_after([], ["--version"], ["train", "--help"], ["generate", "--help"], ["trian"])
    assert loaded.isdisjoint({"torch", "deepspeed", "hydra", "omegaconf", "numpy", "rich", "yaml"})


def test_faults_are_found_before_torch_is_imported():
    loaded = modules_after(["train", "optim.lrr=1"], ["train", "seed=-1"], ["train", "--cfg", "job"])
    assert "hydra" in loaded
    assert loaded.isdisjoint({"torch", "deepspeed", "numpy"})
