"""``init_from`` brings model and tokenizer along, so that training on from a checkpoint is one override."""

import dataclasses
import json

import pytest
from small_run import write_run

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import RunConfig, parse

NANO = parse(RunConfig, compose(TRAIN, ["experiment=tiny"]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("init") / "run"
    write_run(root, dataclasses.replace(NANO.model, vocab_size=320, hidden_size=48))
    return root


def config(*words):
    return parse(RunConfig, compose(TRAIN, ["experiment=tiny", *map(str, words)]))


def test_the_model_is_the_checkpoints(run):
    found = config(f"init_from={run}")
    assert found.model == dataclasses.replace(NANO.model, vocab_size=320, hidden_size=48)
    assert found.train == NANO.train
    found = config("init_from=" + str(run / "checkpoints" / "step-00000020"), "model.router_bias_rate=0.5")
    assert found.model == dataclasses.replace(NANO.model, vocab_size=320, hidden_size=48, router_bias_rate=0.5)


def test_words_win(run):
    assert config(f"init_from={run}", "model=small").model.hidden_size == 192
    found = config(f"init_from={run}", "data.tokenizer.pad_to_multiple=7")
    assert found.data.tokenizer.pad_to_multiple == 7
    assert found.model.hidden_size == 48


def test_a_run_that_has_begun_keeps_its_own(run, tmp_path):
    words = [f"init_from={tmp_path / 'gone'}", f"runs_dir={tmp_path}", "name=mine"]
    assert config(*words).model == NANO.model  # nothing to inherit: training will say that it is not there
    (tmp_path / "mine").mkdir()
    own = dataclasses.asdict(config(f"init_from={run}"))
    (tmp_path / "mine" / "config.json").write_text(json.dumps(own))
    assert config(*words).model.hidden_size == 48
