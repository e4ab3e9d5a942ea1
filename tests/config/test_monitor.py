"""What the config says of the monitor, and that faults on purpose must be meant."""

import pytest

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import ConfigError, RunConfig, parse


def faults(*overrides):
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, compose(TRAIN, ["experiment=tiny", *overrides]))
    return caught.value.faults


def test_nothing_is_injected_or_skipped_by_default():
    config = parse(RunConfig, compose(TRAIN, []))
    assert (config.monitor.action, config.inject.allow, config.inject.faults) == ("log", False, {})


def test_a_fault_must_be_meant():
    (sentence,) = faults("inject.faults.20=random_tokens")
    assert sentence.startswith("inject.faults spoils a run on purpose")
    assert "inject.allow=true" in sentence
    config = parse(RunConfig, compose(TRAIN, ["inject.faults.20=random_tokens", "inject.allow=true"]))
    assert config.inject.faults == {"20": "random_tokens"}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("inject.faults.last=lr_x10", "inject.faults.last must be the number of a step"),
        ("inject.faults.0=lr_x10", "inject.faults.0 must be the number of a step, from 1"),
        ("inject.faults.5=lr_x11", "inject.faults.5='lr_x11' must be one of random_tokens, "),
        ("monitor.action=stop", "monitor.action='stop' must be one of log, skip"),
        ("monitor.window=8", "monitor.window=8 must be at least 24"),
    ],
)
def test_what_is_wrong_is_named(override, sentence):
    assert any(found.startswith(sentence) for found in faults(override, "inject.allow=true"))


def test_going_back_needs_checkpoints():
    (sentence,) = faults("monitor.action=rewind", "checkpoint.every=0")
    assert "set checkpoint.every" in sentence
