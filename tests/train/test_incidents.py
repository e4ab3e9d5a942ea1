"""What is kept of a step that was out of the ordinary, and the check that it passes through."""

import json
import math
from types import SimpleNamespace

import pytest

from k2train.monitor import Decision, Finding
from k2train.report.records import in_order, read_lines
from k2train.train import veto
from k2train.train.incidents import Incidents, incident
from k2train.train.metrics import MetricsFile

STEP = SimpleNamespace(
    number=11, tokens_after=99, first_sample=88, samples=8, phase=SimpleNamespace(name="training"), lr_ratio=0.5
)
RISE = Decision(apply=True, findings=(Finding("loss", 3.0, 2.0, 20.4),))
NAN = Decision(apply=False, findings=(Finding("grad_norm", math.nan, math.nan, math.inf),))


def test_the_record_of_an_incident():
    found = incident(STEP, RISE)
    assert (found["step"], found["incident"]["action"], found["incident"]["samples"]) == (12, "logged", [88, 96])
    assert found["incident"]["sentence"] == "the loss is 3, 20 deviations above 2"
    bad = incident(STEP, NAN)["incident"]
    assert (bad["action"], bad["sentence"]) == ("skipped", "the gradient is not finite")
    assert bad["findings"] == [{"signal": "grad_norm", "value": None, "expected": None, "deviations": None}]


def test_each_has_a_folder_and_later_ones_go_when_a_run_goes_back(tmp_path):
    said = []
    hook, record = Incidents(tmp_path / "incidents", say=said.append), incident(STEP, RISE)
    hook.start(SimpleNamespace(progress=SimpleNamespace(step=0)))
    hook.incident(record)
    hook.incident(record | {"step": 20})
    assert json.loads((tmp_path / "incidents" / "12" / "incident.json").read_text()) == record
    hook.start(SimpleNamespace(progress=SimpleNamespace(step=12)))
    assert [path.name for path in (tmp_path / "incidents").iterdir()] == ["12"]
    assert not said


def test_a_disk_that_refuses_stops_nothing(tmp_path):
    said = []
    (tmp_path / "incidents").write_text("a file")
    Incidents(tmp_path / "incidents", say=said.append).incident(incident(STEP, RISE))
    assert said[0].startswith("the incident of step 12 is in metrics.jsonl alone: ")


def test_readers_of_metrics_tell_incidents_from_steps(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", say=print)
    file.open(resume_at=0)
    file.incident(incident(STEP, NAN))
    file.log({"step": 12, "loss": 2.0})
    file.warning({"step": 12, "incident": {"action": "warned", "kind": "plateau"}})
    file.finish(failed=False)
    records, damaged = read_lines((tmp_path / "metrics.jsonl").read_text())
    steps, _, incidents = in_order(records)
    assert (len(records), damaged, steps) == (3, 0, [{"step": 12, "loss": 2.0}])
    assert [record["incident"]["action"] for record in incidents] == ["warned"]  # the last of a step


def test_the_first_question_about_a_norm_is_ours_and_the_others_are_not():
    original = lambda norm: norm < 0  # noqa: E731
    module = SimpleNamespace(is_invalid_grad_norm=original)

    class Optimizer:
        __module__ = "k2train_test_module"

    veto.sys.modules["k2train_test_module"] = module
    try:
        for answer in (True, False):
            with veto.deciding(Optimizer(), lambda norm, answer=answer: answer):
                assert module.is_invalid_grad_norm(1.0) is answer
                assert not module.is_invalid_grad_norm(1.0)
                assert module.is_invalid_grad_norm(-1.0)
            assert module.is_invalid_grad_norm is original
        with pytest.raises(RuntimeError), veto.deciding(Optimizer(), lambda norm: True):
            raise RuntimeError
        assert module.is_invalid_grad_norm is original
    finally:
        del veto.sys.modules["k2train_test_module"]
