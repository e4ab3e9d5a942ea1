"""From words with several values to runs."""

import pytest

from k2train.cli import main
from k2train.cli.compose import Span, swept
from k2train.cli.multirun import combinations


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("optim.lr=0.01,2e-2", ["optim.lr=0.01", "optim.lr=0.02"]),
        ("seed=range(1,4)", ["seed=1", "seed=2", "seed=3"]),
        ("model=glob(small*)", ["model=small", "model=small-dense", "model=small-gqa"]),
        ("model=nano,small", ["model=nano", "model=small"]),
        ("optim.betas=[0.9,0.95],[0.9,0.99]", ["optim.betas=[0.9,0.95]", "optim.betas=[0.9,0.99]"]),
        ("data.path='/a,b'", ["data.path=/a,b"]),
        ("generate.prompt='x, y',z", ["generate.prompt=x, y", "generate.prompt=z"]),
        ("generate.prompt=def f(x):\n", ["generate.prompt=def f(x):\n"]),  # nothing of Hydra's
        ("optim.lr=tag(log,interval(0.001,0.1))", Span(0.001, 0.1, log=True)),
        ("optim.lr=interval(0.001,0.1)", Span(0.001, 0.1, log=False)),
    ],
)
def test_values_are_read_by_hydras_grammar(word, values):
    assert swept(word) == values


def test_options_of_ones_own_are_among_those_of_a_glob(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").touch()
    assert "model=mine" in swept("model=glob(m*)", [tmp_path])


def test_all_combinations_the_last_fastest():
    assert combinations({"a=1,2": ["a=1", "a=2"], "b=x": ["b=x"], "c=3,4": ["c=3", "c=4"]}) == [
        ["a=1", "b=x", "c=3"],
        ["a=1", "b=x", "c=4"],
        ["a=2", "b=x", "c=3"],
        ["a=2", "b=x", "c=4"],
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optim.lr=interval(0.01,0.1)"], "say how many values are to be tried, as in --trials 20"),
        (["train.threads=1,2", "--trials", "2"], "train.threads leaves what is learnt as it is"),
        (["seed=1,2", "--slurm", "tiem=5"], "--slurm tiem=5: "),
        (["optim.lr=0.01,-1"], "optim.lr=-1"),
        (["model=glob(x*)"], "model=glob(x*): no option matches; the options are 100m, "),
    ],
)
def test_a_wrong_word_ends_it_before_a_run_is_started(words, sentence, tmp_path, capsys):
    assert main(["train", "--multirun", f"runs_dir={tmp_path}", "name=s", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("s/*/"))


def test_a_run_is_no_place_for_a_sweep(tmp_path, capsys):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "config.json").touch()
    assert main(["train", "-m", f"runs_dir={tmp_path}", "name=s", "seed=1,2"]) == 2
    assert "give the sweep another name" in capsys.readouterr().err
