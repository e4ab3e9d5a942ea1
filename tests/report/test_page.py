import math
import re

import pytest
from made_runs import long_run, make_run, step, telemetry, validation

from k2train.report import read_run, write_page
from k2train.report.page import render


def page(*folders, **options):
    return render([read_run(folder) for folder in folders], **options)


@pytest.mark.parametrize(
    "records",
    [
        [step(1)],
        [validation(1)],
        [step(1, loss=None, grad_norm=None, max_logit=-math.inf), step(2, loss=math.nan)],
        [{"step": 1}],
        [step(n, grad_norm=10.0 ** (n % 5)) for n in range(1, 300)] + [validation(299)],
        [validation(1), validation(2, sets={"a": {"loss": 3.0, "bits_per_byte": None}, "b": {"loss": 3.0}})],
        [step(1, heads=[1.0, None]), step(2, heads=[]), step(3, heads={"a": {"b": "text"}}), step(4)],
    ],
    ids=["one step", "validation alone", "not finite", "keys missing", "long", "several sets", "odd arrays"],
)
def test_a_page_comes_of_any_run(tmp_path, records):
    text = page(make_run(tmp_path / "r", records))
    assert "nan" not in re.sub(r"<script>.*</script>", "", text, flags=re.S).lower()


def test_text_is_escaped_everywhere(tmp_path):
    text = page(long_run(tmp_path / "<b>name"), long_run(tmp_path / "other", note="<i>&"))
    assert len(re.findall("<script>", text)) == 1
    for raw in ("<img", "<b>name", "<i>"):
        assert raw not in text
    assert "&lt;img src=http" in text


def test_held_out_sets_are_shown_each(tmp_path):
    one, two = long_run(tmp_path / "a"), long_run(tmp_path / "b")
    text = page(one)
    assert "<th>held out: code</th><td>3.0017, 1.4000 bits per byte</td>" in text
    assert '"name": "code"' in text
    assert ">held out: code</b>" in page(one, two)  # a chart of its own


def test_scores_of_validations_are_charts(tmp_path):
    records = [step(1), *(validation(n, next_line_accuracy=n / 10, own_score=None) for n in (2, 3))]
    text = page(make_run(tmp_path / "a", records))
    assert "<th>next line accuracy</th><td>0.3000</td>" in text
    assert "<b>next line accuracy</b>" in text
    assert "own score" not in text
    assert "<b>next line accuracy</b>" in page(make_run(tmp_path / "b", [step(1)]), tmp_path / "a")


def test_a_spike_of_one_step_is_on_the_page(tmp_path):
    text = page(long_run(tmp_path / "r", steps=3000, spike_at=1234))
    assert re.search(r'"x": \[[^]]*\b1234\b', text)


def test_settings_that_differ_are_shown_side_by_side(tmp_path):
    one, two = make_run(tmp_path / "a", [step(1)], lr=0.01), make_run(tmp_path / "b", [step(1)], lr=0.02)
    settings = page(one, two).partition('<section id="settings">')[2]
    rows = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>", settings)
    assert rows == [("name", "&#34;a&#34;", "&#34;b&#34;"), ("optim.lr", "0.01", "0.02")]


def test_damaged_lines_are_counted_on_the_page(tmp_path):
    assert "<th>damaged lines, left out</th><td>1</td>" in page(make_run(tmp_path / "r", [step(1)], torn="{"))


def test_the_axis_may_be_tokens(tmp_path):
    folder = make_run(tmp_path / "r", [step(1), step(2)])
    assert '"first": 4096.0, "last": 8192.0' in page(folder, x="tokens")


def test_telemetry_has_charts_of_its_own(tmp_path):
    text = page(long_run(tmp_path / "r"))
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', text, flags=re.S))
    assert {"attention", "experts", "layers", "throughput", "data"} <= sections.keys()
    titles = {name: re.findall(r"<figcaption><b>(.*?)</b>", section) for name, section in sections.items()}
    assert titles["attention"][2:] == [
        "largest logit of each layer",
        "largest logit of each head",
        "clip events",
        "all clips of a head together",
    ]  # and no bounds, as all are exact
    assert re.search(r">1.2 at 8\d\d: 0.1</title>", sections["attention"])
    assert titles["throughput"] == ["speed", "utilisation", "memory", "where the time goes"]
    assert "load of each expert" in titles["experts"]
    assert not [title for title in titles["further"] if title in telemetry(1)]
    assert ">1.7</text>" not in sections["attention"]  # a row is layer.head, from 0
    assert ">2.3 at 990: 43</title>" in sections["attention"]


def test_a_page_of_a_long_run_stays_small(tmp_path):
    write_page(tmp_path / "page.html", [read_run(long_run(tmp_path / "r", steps=5000))])
    assert (tmp_path / "page.html").stat().st_size < 1_000_000
