import fcntl
import json

import pytest
from made_runs import incident, make_run, step, validation

from k2train.report import ReportError, read_run
from k2train.report.records import in_order, read_lines, run_state, warnings


def read(records, *, torn=""):
    lines, damaged = read_lines("".join(json.dumps(record) + "\n" for record in records) + torn)
    steps, validations, _ = in_order(lines)
    return steps, validations, damaged


def numbers(records):
    return [record["step"] for record in records]


def test_a_torn_last_line_is_left_out_and_counted():
    steps, validations, damaged = read([step(1), step(2), validation(2)], torn='{"step": 3, "lo')
    assert (numbers(steps), numbers(validations), damaged) == ([1, 2], [2], 1)


def test_what_a_resumed_run_writes_replaces_what_was_there():
    before = [step(1), step(2), validation(2), step(3), step(4), validation(4)]
    steps, validations, _ = read([*before, step(3, loss=7.0)])
    assert [(record["step"], record["loss"]) for record in steps] == [(1, 4.0), (2, 3.5), (3, 7.0)]
    assert numbers(validations) == [2]


def test_a_run_that_went_back_replaces_its_steps_and_says_so_for_good():
    went_back = {"step": 4, "tokens": 4, "incident": {"action": "rewound", "to": 2, "rewind": 1, "sentence": "a spike"}}
    before = [step(1), step(2), step(3, loss=7.0), incident(3, "odd"), went_back]
    after = [step(3, loss=3.0), incident(3, "odd again"), step(4, loss=2.0)]
    steps, _, incidents = in_order([*before, *after])
    assert [(record["step"], record["loss"]) for record in steps] == [(1, 4.0), (2, 3.5), (3, 3.0), (4, 2.0)]
    assert [record["incident"]["sentence"] for record in incidents] == ["odd again", "a spike"]


def test_a_validation_does_not_replace_its_step():
    steps, validations, _ = read([step(2), validation(2), validation(2)])
    assert (numbers(steps), numbers(validations)) == ([2], [2])


def test_lines_that_are_no_records_are_left_out():
    steps, _, damaged = read([[1], "x", {"loss": 1.0}, step(1)], torn="\x00\x00")
    assert (numbers(steps), damaged) == ([1], 4)


def test_damaged_files_of_a_run_are_counted(tmp_path):
    folder = make_run(tmp_path / "r", [step(1)], torn="{", samples=[{"step": 1, "text": "a"}], incidents={"i": {}})
    (folder / "incidents" / "i" / "incident.json").write_text("{")
    (folder / "samples.jsonl").open("a").write('{"text": ')
    run = read_run(folder)
    assert run.damaged == 3
    assert [sample["text"] for sample in run.samples] == ["a"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is no run: there is no such folder; give the folder of one"),
        ({}, "is no run: it has no config.json; give the folder of one"),
        ({"config.json": "{"}, "config.json is damaged"),
        ({"config.json": "{}"}, "has no metrics.jsonl yet: wait for its first step"),
        ({"config.json": "{}", "metrics.jsonl": ""}, "has recorded nothing yet"),
    ],
)
def test_what_is_no_run_is_said_in_a_sentence(tmp_path, files, message):
    folder = tmp_path / "r"
    for name, text in (files or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    if files == {}:
        folder.mkdir()
    with pytest.raises(ReportError, match=message) as raised:
        read_run(folder)
    assert "\n" not in str(raised.value)


def test_the_state_of_a_run(tmp_path):
    folder = make_run(tmp_path / "r", [step(1)])
    assert run_state(folder) == "died without a word"
    (folder / "exit_status").write_text("143\n")
    assert run_state(folder) == "ended with status 143"
    (folder / "exit_status").write_text("0\n")
    assert run_state(folder) == "finished"
    (folder / "exit_status").unlink()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_state(folder) == "running"
    assert run_state(folder) == "died without a word"


def test_a_summary_of_fewer_steps_is_of_the_run_before_it_was_made_longer(tmp_path):
    folder = make_run(tmp_path / "r", [step(1), step(2)], summary={"steps": 2})
    assert read_run(folder).state == "finished"
    (folder / "summary.json").write_text('{"steps": 1}')
    assert read_run(folder).summary is None


def test_steps_that_were_not_applied_and_incidents_are_warned_of(tmp_path):
    records = [incident(1, "old"), step(1), incident(1, "the loss is 7.9"), step(1), step(2, skipped_steps=2)]
    run = read_run(make_run(tmp_path / "r", records, incidents={"1": {"more": {"a": 1}}}))
    assert list(warnings(run)) == [(2, "2 steps were not applied"), (None, "incident at 1: the loss is 7.9")]
    assert run.incidents == {"1": {"incident": records[2], "more": {"a": 1}}}
    assert numbers(run.steps) == [1, 2]
