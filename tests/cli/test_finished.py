"""When a run is finished, and when it goes on."""

import dataclasses
from types import SimpleNamespace

import pytest

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.cli.train import _finished
from k2train.config import ConfigError, RunConfig, parse
from k2train.paths import RunPaths
from k2train.train.phases import build_plan


def test_a_run_is_finished_until_more_steps_are_asked_for(tmp_path, monkeypatch):
    config, paths = parse(RunConfig, compose(TRAIN, ["experiment=tiny"])), RunPaths(tmp_path)
    assert _finished(config, paths) is None
    paths.summary.write_text("{}")
    summary = SimpleNamespace(steps=build_plan(config).steps)
    monkeypatch.setattr("k2train.report.Summary.from_json", lambda text: summary)
    assert _finished(config, paths) is summary
    longer = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, steps=summary.steps + 1))
    assert _finished(longer, paths) is None


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("runs_dir=s3://bucket/runs", "runs_dir='s3://bucket/runs' is in an object store"),
        ("init_from=gs://bucket/a", "init_from='gs://bucket/a' is in an object store"),
        ("allow_changed=[optim.lrr]", "allow_changed='optim.lrr' is no key: did you mean optim.lr?"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_begins(override, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse(RunConfig, compose(TRAIN, ["experiment=tiny", override]))
    with pytest.raises(ConfigError, match=r"init_from='a' begins a new run but resume='b' goes on with another"):
        parse(RunConfig, compose(TRAIN, ["experiment=tiny", "init_from=a", "resume=b"]))
