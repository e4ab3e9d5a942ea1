import pytest
import torch
from made_runs import make_run, step, validation

from k2train.checkpoint import Interval, save_checkpoint
from k2train.cli import main
from k2train.comm import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def save(run, number, **tensors):
    """A checkpoint with these as masters."""
    save_checkpoint(
        run / "checkpoints",
        step=number,
        intervals=[Interval(name, "master", 0, values) for name, values in tensors.items()],
        shapes={name: tuple(values.shape) for name, values in tensors.items()},
        state={},
        world=ALONE,
    )


@pytest.fixture
def pair(tmp_path):
    """Makes two runs; the second has other values in some steps."""

    def make(changes, **settings):
        records = [step(n) for n in range(1, 6)]
        first = make_run(tmp_path / "first", [*records, validation(5)])
        other = [record | changes.get(record["step"], {}) for record in records]
        return first, make_run(tmp_path / "second", [*other, validation(5)], **settings)

    return make


def diff(pair, *words):
    return main(["diff", *map(str, pair), *words])


def test_the_same_but_for_times(pair, capsys):
    runs = pair({3: {"elapsed": 99.0, "tokens_per_second": 1.0}})
    for run in runs:
        save(run, 5, w=torch.tensor([1.0, float("nan")]))
    assert diff(runs, "--tolerance", "0") == 0
    out = capsys.readouterr().out
    assert "steps        5 compared, up to step 5: equal in all bits" in out
    assert "checkpoints  1 compared, up to step 5: equal in all bits" in out
    assert out.endswith("The same, bit for bit.\n")


def test_to_rounding(pair, capsys):
    runs = pair({4: {"loss": 3.25 * (1 + 1e-7)}, 5: {"loss": 3.2 * (1 + 4e-7)}})
    assert diff(runs) == 0
    out = capsys.readouterr().out
    assert "first difference: loss at step 4, 3.25 and 3.250000325" in out
    assert "largest difference: loss at step 5" in out
    assert out.endswith("The same to rounding (0.0001).\n")
    assert diff(runs, "--tolerance", "0") == 1


def test_where_they_part(pair, capsys):
    runs = pair({3: {"loss": 3.4, "lr": 0.02}, 4: {"loss": 9.0}}, seed=1)
    save(runs[0], 4, same=torch.ones(3), a=torch.ones(4), b=torch.ones(4))
    save(runs[1], 4, same=torch.ones(3), a=torch.full((4,), 1.5), b=torch.ones(4) + 1e-7)
    assert diff(runs) == 1
    out = capsys.readouterr().out
    assert "setting      seed was 0 and is now 1" in out
    assert "beyond rounding: lr at step 3, 0.01 and 0.02 (relative 0.5)" in out
    assert "beyond rounding: loss at step 3, 3.3333333333333335 and 3.4 (relative 0.02)" in out
    assert "beyond rounding: a/master at step 4 (relative 0.33)" in out
    assert "beyond rounding: b/master" not in out
    assert out.endswith("They part at step 3.\n")


@pytest.mark.parametrize("value", [None, [3.25, 1.0], "much"])
def test_what_is_no_number_is_no_rounding(pair, value):
    assert diff(pair({4: {"loss": value}}), "--tolerance", "1") == 1


def test_telemetry_is_compared_by_its_largest_number(pair, capsys):
    runs = pair({})
    text = [(run / "metrics.jsonl").read_text().replace('"lr"', '"head_max_logit": HEADS, "lr"', 1) for run in runs]
    (runs[0] / "metrics.jsonl").write_text(text[0].replace("HEADS", '{"layers.0": [40.0, 1.0]}'))
    (runs[1] / "metrics.jsonl").write_text(text[1].replace("HEADS", '{"layers.0": [40.0, 1.0001]}'))
    assert diff(runs) == 0
    assert "first difference: head_max_logit at step 1 (relative 2.5e-06)" in capsys.readouterr().out


def test_a_metric_that_one_lacks_is_no_difference(pair, capsys):
    assert diff(pair({4: {"added": 1.0}}), "--tolerance", "0") == 0
    assert capsys.readouterr().out.endswith("The same, bit for bit.\n")


def test_a_tensor_that_one_lacks(pair, capsys):
    runs = pair({})
    save(runs[0], 5, w=torch.ones(2))
    save(runs[1], 5, v=torch.ones(2))
    assert diff(runs) == 1
    assert "w/master at step 5 (relative inf)" in capsys.readouterr().out


def test_what_a_process_keeps_is_compared_between_as_many_processes(pair, capsys):
    runs = pair({})
    weights = {"w": torch.ones(2)}
    save(runs[0], 4, **weights, **{"rank-00000/generators": torch.ones(2)})
    save(runs[1], 4, **weights, **{"rank-00000/generators": torch.zeros(2), "rank-00001/generators": torch.ones(2)})
    assert diff(runs) == 0
    assert capsys.readouterr().out.endswith("The same, bit for bit.\n")
    save(runs[0], 5, **weights, **{"rank-00000/generators": torch.ones(2)})
    save(runs[1], 5, **weights, **{"rank-00000/generators": torch.zeros(2)})
    assert diff(runs) == 1


def test_nothing_in_common(tmp_path, capsys):
    runs = [make_run(tmp_path / str(n), [step(n)]) for n in (1, 2)]
    assert diff(runs) == 1
    assert "have recorded no step in common" in capsys.readouterr().err
