import json
import math

import matplotlib.image
import pytest

from k2train.report import draw_curves, read_records
from k2train.report.curves import running_mean


def step(number, **changes):
    plain = {
        "step": number,
        "tokens": 4096 * number,
        "loss": 3.0 + 1 / number,
        "bits_per_byte": 1.5,
        "lr": 0.01,
        "grad_norm": 0.4,
        "tokens_per_second": 12_345.6,
        "max_logit": 20.0,
        "clipped_heads": 0,
        "balance_max": 1.3,
    }
    return plain | changes


def validation(number):
    return {"step": number, "tokens": 1, "validation_loss": 3.1, "validation_bits_per_byte": 1.6}


def write(path, records, *, torn=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + torn)
    return path


def numbers(records):
    return [record["step"] for record in records]


def test_a_torn_last_line_is_left_out(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [step(1), step(2), validation(2)], torn='{"step": 3, "lo')
    steps, validations = read_records(path)
    assert (numbers(steps), numbers(validations)) == ([1, 2], [2])


def test_what_a_resumed_run_writes_replaces_what_was_there(tmp_path):
    before = [step(1), step(2), validation(2), step(3), step(4), validation(4)]
    after = [step(3, loss=7.0)]
    steps, validations = read_records(write(tmp_path / "metrics.jsonl", before + after))
    assert [(record["step"], record["loss"]) for record in steps] == [(1, 4.0), (2, 3.5), (3, 7.0)]
    assert numbers(validations) == [2]


def test_a_validation_does_not_replace_its_step(tmp_path):
    steps, validations = read_records(write(tmp_path / "metrics.jsonl", [step(2), validation(2), validation(2)]))
    assert (numbers(steps), numbers(validations)) == ([2], [2])


def test_lines_that_are_no_records_are_left_out(tmp_path):
    steps, _ = read_records(write(tmp_path / "metrics.jsonl", [[1], "x", {"loss": 1.0}, step(1)], torn="\x00\x00"))
    assert numbers(steps) == [1]


@pytest.mark.parametrize(
    "records",
    [
        [],
        [step(1)],
        [validation(0)],
        [step(1, loss=None, grad_norm=None, max_logit=float("-inf")), step(2, loss=float("nan"))],
        [{"step": 1, "tokens": 1}],
        [step(n, grad_norm=10.0 ** (n % 5)) for n in range(1, 300)] + [validation(299)],
        [validation(1), validation(2) | {"sets": {"a": {"loss": 3.0, "bits_per_byte": None}, "b": {"loss": 3.0}}}],
    ],
    ids=["empty", "one step", "validation alone", "not finite", "keys missing", "long", "several sets"],
)
def test_a_picture_comes_of_any_run(tmp_path, records):
    folder = tmp_path / "a $run$ of_mine"
    folder.mkdir()
    metrics, png = write(folder / "metrics.jsonl", records), folder / "curves.png"
    draw_curves(metrics, png, tau=100.0, compression={"gzip -9": 2.1, "xz -9": 2.0, "xz -9 joined": 1.5, "other": 1.0})
    height, width, _ = matplotlib.image.imread(png).shape
    assert width > height > 500
    assert sorted(p.name for p in folder.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_the_picture_shows_the_metrics(tmp_path):
    pictures = []
    for loss in (3.0, 3.0, 4.0):
        metrics = write(tmp_path / "metrics.jsonl", [step(1, loss=2.0), step(2, loss=loss), step(3, loss=2.5)])
        draw_curves(metrics, tmp_path / "curves.png")
        pictures.append(matplotlib.image.imread(tmp_path / "curves.png"))
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()
    records = [step(1), validation(1), step(2), validation(2)]
    for sets in ({}, {"a": {"loss": 2.0, "bits_per_byte": 1.0}}):
        metrics = write(tmp_path / "metrics.jsonl", [record | {"sets": sets} for record in records])
        draw_curves(metrics, tmp_path / "curves.png")
        pictures.append(matplotlib.image.imread(tmp_path / "curves.png"))
    assert (pictures[3] != pictures[4]).any()


def test_pyplot_is_left_alone(tmp_path):
    import matplotlib.pyplot

    before = matplotlib.pyplot.get_fignums()
    draw_curves(write(tmp_path / "metrics.jsonl", [step(1)]), tmp_path / "curves.png")
    assert matplotlib.pyplot.get_fignums() == before


def test_running_mean():
    assert running_mean([4.0, 2.0, 0.0, 2.0], window=3) == [4.0, 2.0, pytest.approx(4 / 3), 1.0]
    assert running_mean([1.0, math.nan, 3.0], window=3) == [1.0, 2.0, 3.0]
    assert math.isnan(running_mean([math.nan], window=3)[0])
    assert running_mean([], window=3) == []
