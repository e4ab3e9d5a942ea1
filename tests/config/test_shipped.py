"""Every config that is shipped composes, with any option of any group, into a valid run."""

from pathlib import Path

import pytest
import yaml

from k2train.cli.commands import COMMANDS, PLAN, TRAIN
from k2train.cli.compose import compose
from k2train.cli.options import group_options
from k2train.config import PlanConfig, RunConfig, parse
from k2train.paths import config_dir
from k2train.train.phases import build_plan

OPTIONS = [(group, option) for group in TRAIN.groups for option in group_options(group, [])]
# What an option asks of the rest.
NEEDS = {("data", option): ["data.path=."] for option in ("folder", "hub", "jsonl", "mixture")}
NEEDS["data", "own"] = ["data.sources.own.kind=my_parts.Mine"]
NEEDS["optim", "own"] = ["optim.name=my_parts.Mine"]
NEEDS["data", "prepared"] = ["data.prepared=."]
NEEDS["schedule", "k2"] = ["model.max_position_embeddings=131072"]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_makes_a_valid_run(group, option):
    config = parse(RunConfig, compose(TRAIN, [f"{group}={option}", *NEEDS.get((group, option), [])]))
    assert build_plan(config).steps > 0


@pytest.mark.parametrize("option", group_options("cluster", []))
def test_cluster_is_valid(option):
    config = parse(PlanConfig, compose(PLAN, [f"cluster={option}"]))
    assert config.cluster.devices >= 1


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_know_their_groups(command):
    primary = yaml.safe_load((config_dir() / f"{command.primary}.yaml").read_text())
    defaults = primary.get("defaults", [])
    if "train" in defaults:  # the plan of a run begins with the run's config
        assert defaults[1:] == [{"cluster": "h100"}, "_self_"]
        defaults = yaml.safe_load((config_dir() / "train.yaml").read_text())["defaults"]
    groups = [next(iter(entry)) for entry in defaults if isinstance(entry, dict)]
    assert tuple(groups) == tuple(group for group in command.groups if group != "cluster")
    if groups:
        assert defaults[-2:] == ["_self_", {"experiment": None}]  # else an experiment's own values would be lost
    parse(command.schema, compose(command, ["cluster=cpu"] if "cluster" in command.groups else []))


def test_every_folder_is_a_group():
    assert {path.name for path in config_dir().iterdir() if path.is_dir()} == {*TRAIN.groups, *PLAN.groups}


def test_every_file_says_what_it_is():
    for path in Path(config_dir()).rglob("*.yaml"):
        assert path.read_text().startswith("# "), path


def test_an_experiment_wins_over_the_primary_config_and_a_word_over_both(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: nano\nseed: 7\noptim:\n  lr: 0.5\n"
    )
    config = parse(RunConfig, compose(TRAIN, ["experiment=mine"], [tmp_path]))
    assert (config.seed, config.optim.lr, config.model.hidden_size) == (7, 0.5, 96)
    config = parse(RunConfig, compose(TRAIN, ["experiment=mine", "seed=8", "model=small"], [tmp_path]))
    assert (config.seed, config.optim.lr) == (8, 0.5)
    assert config.model.hidden_size != 96


def test_roles_follow_the_optimizer():
    config = parse(RunConfig, compose(TRAIN, ["optim.lr=0.125", "optim.roles.head.lr=0.5"]))
    assert {name: role.lr for name, role in config.optim.roles.items()} == {
        "embedding": 0.125,
        "head": 0.5,
        "attention": 0.125,
        "mlp": 0.125,
        "expert": 0.125,
        "router": 0.125,
        "norm": 0.125,
    }
    assert config.optim.roles["norm"].weight_decay == 0
