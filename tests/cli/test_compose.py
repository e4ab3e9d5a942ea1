"""From overrides to a mapping."""

import os

import pytest

from k2train.cli.commands import GENERATE, PREPARE, TRAIN
from k2train.cli.compose import as_yaml, compose
from k2train.config import ConfigError, RunConfig, parse


def fault(command, words, own=()):
    with pytest.raises(ConfigError) as caught:
        compose(command, words, own)
    assert len(caught.value.faults) == 1
    return caught.value.faults[0]


@pytest.mark.parametrize(
    "text", ["def f(x):\n", "a, b = [c]", "'quoted'", "${seed}", "1", "", "null", "x=y", "C:\\new", "naïve 漢字"]
)
def test_text_is_taken_as_it_stands(text):
    assert compose(GENERATE, [f"generate.prompt={text}"])["generate"]["prompt"] == text


def test_optional_text_can_be_null():
    assert compose(TRAIN, ["data.cache_dir=/a b/c"])["data"]["cache_dir"] == "/a b/c"
    assert compose(TRAIN, ["data.cache_dir=null"])["data"]["cache_dir"] is None


@pytest.mark.parametrize(
    ("word", "value"),
    [("1e-3", 1e-3), ("5", 5), ("[1,2]", [1, 2]), ("true", True), ("null", None), ("${seed}", 0)],
)
def test_other_values_are_read(word, value):
    assert compose(TRAIN, [f"optim.betas={word}"])["optim"]["betas"] == value


def test_a_list_of_patterns():
    assert compose(TRAIN, ["data.sources.stdlib.include=[*.py,*.md]"])["data"]["sources"]["stdlib"]["include"] == [
        "*.py",
        "*.md",
    ]


def test_a_group_of_any_names():
    words = ["data=mixture", "data.weights={library:3,own:1.5}", "schedule.phases={a:{steps:2,weights:{own:1}}}"]
    config = compose(TRAIN, words)
    assert config["data"]["weights"] == {"library": 3, "own": 1.5}
    assert config["schedule"]["phases"] == {"a": {"steps": 2, "weights": {"own": 1}}}


def test_a_group_that_is_null_can_be_given_members():
    scaling = compose(TRAIN, ["model.rope_scaling={factor:32,beta_fast:1}", "model.rope_scaling.mscale=1"])
    assert scaling["model"]["rope_scaling"] == {"factor": 32, "beta_fast": 1, "mscale": 1}


def test_the_last_word_counts():
    assert compose(TRAIN, ["seed=1", "seed=2"])["seed"] == 2


def test_prepare_reads_what_train_reads():
    words = ["experiment=tiny", "data=folder", "data.path=/x"]
    assert compose(PREPARE, words) == compose(TRAIN, words)


def test_generate_has_no_groups():
    assert fault(GENERATE, ["model=nano"]).startswith("unknown key model")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("optim.lr=[1", "optim.lr=[1: the value cannot be read"),
        ("optim.lr=${no.such}", "no.such"),
        ("hydra.run.dir=x", "unknown key hydra.run.dir"),
        ("experiment=[tiny,tny]", "experiment=tny: there is no such option: did you mean experiment=tiny?"),
        ("model=null", "model=null: there is no such option"),
        ("seed.more=1", "unknown key seed.more"),
        ("train.hooks=[my_parts.Loud]", "train.hooks holds values by name: write train.hooks.NAME=VALUE"),
        ("~seed=1", "keys can be set, not added or removed"),
    ],
)
def test_wrong_words(word, sentence):
    assert sentence in fault(TRAIN, [word])


def own_experiment(folder, text):
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text(text)
    return [folder]


def test_own_folder_with_a_space_in_its_name(tmp_path):
    own = own_experiment(tmp_path / "my own", "# @package _global_\nseed: 3\n")
    assert compose(TRAIN, ["experiment=mine"], own)["seed"] == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# @package _global_\ndefaults:\n  - override /model: nanno\n", "model/nanno"),
        ("# @package _global_\nseed: [1\n", "a config file is not YAML"),
    ],
)
def test_wrong_files(tmp_path, text, sentence):
    assert sentence in fault(TRAIN, ["experiment=mine"], own_experiment(tmp_path, text))


def test_wrong_key_in_a_file(tmp_path):
    own = own_experiment(tmp_path, "# @package _global_\nsedd: 3\n")
    with pytest.raises(ConfigError, match="unknown key sedd: did you mean 'seed'"):
        parse(RunConfig, compose(TRAIN, ["experiment=mine"], own))


def test_hydra_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose(TRAIN, ["experiment=tiny"])
    assert os.listdir(tmp_path) == []


def test_yaml_can_be_read_back(tmp_path):
    mapping = compose(TRAIN, ["generate.prompt=a: 'b'\n", "seed=3"])
    own = own_experiment(tmp_path, "# @package _global_\n" + as_yaml(mapping))
    assert compose(TRAIN, ["experiment=mine"], own) == mapping
