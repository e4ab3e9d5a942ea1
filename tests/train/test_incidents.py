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
DOCUMENT = {
    "loss": 9.1,
    "tokens": 63,
    "name": "web/17",
    "origin": "http://a.example",
    "shard": "web/train-0",
    "sample": 90,
    "span": [0, 63],
    "text": "strange",
}
ODD = Decision(apply=True, findings=(Finding("document", 9.1, 4.0, 17.0),))
NAN = Decision(apply=False, findings=(Finding("grad_norm", math.nan, math.nan, math.inf),))


def test_the_record_of_an_incident():
    found = incident(STEP, RISE, action="logged")
    assert (found["step"], found["incident"]["action"], found["incident"]["samples"]) == (12, "logged", [88, 96])
    assert found["incident"]["sentence"] == "the loss is 3, 20 deviations above 2"
    bad = incident(STEP, NAN, action="skipped")["incident"]
    assert (bad["action"], bad["sentence"]) == ("skipped", "the gradient is not finite")
    assert bad["findings"] == [{"signal": "grad_norm", "value": None, "expected": None, "deviations": None}]


def trainer(step):
    return SimpleNamespace(progress=SimpleNamespace(step=step), evidence={"curves": {}, "documents": [DOCUMENT]})


def test_a_document_is_named():
    sentence = incident(STEP, ODD, action="logged", document=DOCUMENT)["incident"]["sentence"]
    assert sentence == "a document's loss is 9.1, 17 deviations above 4 (web/17, http://a.example)"


def test_each_has_a_folder_and_later_ones_go_when_a_run_goes_back(tmp_path):
    said = []
    folder = tmp_path / "incidents"
    hook, record = Incidents(folder, say=said.append), incident(STEP, RISE, action="logged")
    hook.start(trainer(0))
    hook.incident(record)
    hook.incident(record | {"step": 20})
    hook.incident(incident(STEP, RISE, action="rewound", rewind=1, to=10, left_out=[80, 95]))
    assert json.loads((folder / "12" / "incident.json").read_text()) == record
    assert json.loads((folder / "12" / "documents.json").read_text())["documents"] == [DOCUMENT]
    text = (folder / "12" / "incident.txt").read_text()
    assert "9.100   63      web/17, http://a.example (sample 90, web/train-0)" in text
    assert text.endswith("strange\n")
    hook.start(trainer(12))
    assert {path.name for path in folder.iterdir()} == {"12", "12-rewind-1"}
    hook.rewound(10)
    assert {path.name for path in folder.iterdir()} == {"12-rewind-1"}  # which the run went back from
    assert not said


def test_a_disk_that_refuses_stops_nothing(tmp_path):
    said = []
    (tmp_path / "incidents").write_text("a file")
    hook = Incidents(tmp_path / "incidents", say=said.append)
    hook.start(trainer(0))
    hook.incident(incident(STEP, RISE, action="logged"))
    assert said[0].startswith("the incident of step 12 is in metrics.jsonl alone: ")


def test_readers_of_metrics_tell_incidents_from_steps(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", say=print)
    file.open(resume_at=0)
    file.incident(incident(STEP, NAN, action="skipped"))
    file.log({"step": 12, "loss": 2.0})
    file.warning({"step": 12, "incident": {"action": "warned", "kind": "plateau"}})
    file.finish(failed=False)
    records, damaged = read_lines((tmp_path / "metrics.jsonl").read_text())
    steps, _, incidents = in_order(records)
    assert (len(records), damaged, steps) == (3, 0, [{"step": 12, "loss": 2.0}])
    assert [record["incident"]["action"] for record in incidents] == ["warned"]  # the last of a step


def test_that_a_run_went_back_stays_on_record(tmp_path):
    went_back = incident(STEP, RISE, action="rewound", rewind=1, to=10, left_out=[80, 95])
    file = MetricsFile(tmp_path / "metrics.jsonl", say=print)
    file.open(resume_at=0)
    for step in range(1, 12):
        file.log({"step": step, "loss": 2.0})
    file.incident(went_back)
    file.log({"step": 11, "loss": 1.0})
    file.finish(failed=True)
    file.open(resume_at=10)  # killed, and on from the same checkpoint
    file.log({"step": 11, "loss": 1.0})
    file.finish(failed=False)
    steps, _, incidents = in_order(read_lines((tmp_path / "metrics.jsonl").read_text())[0])
    assert [(record["step"], record["loss"]) for record in steps] == [*((s, 2.0) for s in range(1, 11)), (11, 1.0)]
    assert incidents == [went_back]


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
