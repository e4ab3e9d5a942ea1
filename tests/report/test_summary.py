import dataclasses
import io
import json

import pytest
from rich.console import Console

from k2train.report import Summary, summary_table

SUMMARY = Summary(
    name="quickstart",
    folder="runs/quickstart",
    steps=1200,
    skipped_steps=0,
    tokens=4_915_200,
    elapsed=300.2,
    tokens_per_second=16_384.0,
    parameters_total=3_456_789,
    parameters_active=1_234_567,
    validation_loss=2.7,
    validation_bits_per_byte=1.89,
    sets={},
    compression={"gzip -9": 2.1, "xz -9": 2.05, "xz -9 joined": 1.55},
    max_logit=112.3,
    clipped_steps=421,
    peak_memory=1_825_361_101,
    world_size=1,
    device="cpu",
    precision="fp32",
)


def text(summary, *, columns=80, terminal=False):
    environment = {"TERM": "xterm"}
    console = Console(file=io.StringIO(), width=columns, force_terminal=terminal or None, _environ=environment)
    console.print(summary_table(summary))
    return console.file.getvalue()


def with_(**changes):
    return dataclasses.replace(SUMMARY, **changes)


def test_json_round_trip():
    assert Summary.from_json(SUMMARY.to_json()) == SUMMARY
    assert Summary.from_json(with_(max_logit=None).to_json()).max_logit is None


@pytest.mark.parametrize("content", ["[]", "{}", json.dumps(dataclasses.asdict(SUMMARY) | {"other": 1})])
def test_another_versions_summary_is_refused(content):
    with pytest.raises(ValueError, match="not the summary of a run by this version"):
        Summary.from_json(content)


def test_the_model_stands_among_the_compressors():
    lines = text(SUMMARY).splitlines()
    begin = next(number for number, line in enumerate(lines) if "bits per byte" in line)
    rows = [" ".join(line.split()) for line in lines[begin + 1 : begin + 5]]
    assert rows == [
        "xz -9, all files joined 1.5500 not beaten",
        "this model 1.8900",
        "xz -9, each file by itself 2.0500 beaten",
        "gzip -9, each file by itself 2.1000 beaten",
    ]


def test_a_tie_is_not_beaten():
    assert text(with_(validation_bits_per_byte=1.55, compression={"xz -9": 1.55})).count("not beaten") == 1


def test_all_facts_fit_into_eighty_columns_without_colour():
    shown = text(SUMMARY)
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for fact in (
        "quickstart is trained",
        "3.46M, 1.23M active a token",
        "2.7000 nats a token",
        "1,200",
        "4.92M at 16.4k a second",
        "5m00s",
        "112.3; QK-Clip acted in 421 steps",
        "1.7 GiB",
        "1 process on cpu, fp32",
        "runs/quickstart/checkpoints",
        "runs/quickstart/report.html",
        "runs/quickstart/sample.txt",
        "runs/quickstart/metrics.jsonl",
    ):
        assert fact in shown


def test_other_runs_read_well_too():
    shown = text(with_(max_logit=None, clipped_steps=1, skipped_steps=3, world_size=4, device="cuda"))
    assert "none seen; QK-Clip acted in 1 step\n" in "\n".join(line.rstrip() for line in shown.splitlines()) + "\n"
    assert "1,200, of which 3 were not applied" in shown
    assert "4 processes on cuda" in shown
    assert "1.7 GiB a process" in shown


def test_several_held_out_sets():
    sets = {"code": {"loss": 2.5, "bits_per_byte": 1.5}, "a-source-of-prose": {"loss": 3.0, "bits_per_byte": 2.0}}
    shown = text(with_(sets=sets))
    assert "  a-source-of-prose  3.0000, 2.0000 bits per byte" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_terminal_gets_colour_and_a_long_path_stays_whole():
    folder = "/home/someone/" + "a-long-folder/" * 8 + "run"
    assert "\x1b[" in text(SUMMARY, terminal=True)
    unfolded = "".join(line.strip() for line in text(with_(folder=folder)).splitlines())
    assert f"{folder}/report.html" in unfolded
