"""Tables and figures of rows."""

import csv
from pathlib import Path

import pytest

from k2train.cli.table import main
from k2train.experiments.sweep import Row
from k2train.experiments.table import figures, tabulate
from k2train.report import Section, write_sheet

LOSS = "validation_loss"


def row(results=None, failure=None, **choices):
    return Row(Path("r"), {}, [], choices, results, failure)


def grid():
    losses = {(1e-3, "muon"): 3.0, (1e-2, "muon"): 2.0, (1e-3, "adamw"): 4.0, (1e-2, "adamw"): 5.0}
    return [
        row({LOSS: loss + 0.1 * seed}, lr=lr, optim=optim, seed=seed, steps=5)
        for (lr, optim), loss in losses.items()
        for seed in (0, 1)
    ]


def test_seeds_are_joined_and_what_does_not_vary_is_left_out():
    table = tabulate(grid(), [LOSS])
    assert table.keys == ["lr", "optim"]
    assert [tuple(line.choices.values()) for line in table.lines] == [
        *((0.001, "adamw"), (0.001, "muon"), (0.01, "adamw"), (0.01, "muon"))
    ]
    best = table.lines[3].means[LOSS]
    assert best.mean == pytest.approx(2.05)
    assert best.half == pytest.approx(12.706 * 0.05, abs=1e-3)  # of two values, s / sqrt(2) is half their distance
    assert table.cells()[4] == ["0.01", "muon", "2", "2.0500 ± 0.6353"]


def test_numbers_are_in_order_of_size_whatever_the_order_of_the_rows():
    rows = [row({LOSS: 1.0}, size=size) for size in (10, 9, 100, None)]
    assert [line.choices["size"] for line in tabulate(rows, [LOSS]).lines] == [9, 10, 100, None]
    assert tabulate(rows, [LOSS]) == tabulate(rows[::-1], [LOSS])


def test_failures_and_what_is_missing_are_told():
    rows = [row({LOSS: 1.0, "max_logit": None}, seed=1), row(failure="killed by SIGKILL", seed=2), row(seed=3)]
    table = tabulate(rows, [LOSS, "max_logit"])
    assert table.cells() == [["runs", LOSS, "max_logit", "failures"], ["1 of 3", "1.0000", "-", "killed by SIGKILL"]]
    read = list(csv.DictReader(table.as_csv().splitlines()))
    assert read == [
        {
            "runs": "3",
            "finished": "1",
            LOSS: "1.0",
            f"{LOSS}_half_interval": "",
            "max_logit": "",
            "max_logit_half_interval": "",
            "failures": "killed by SIGKILL",
        }
    ]


def test_figures_of_two_settings(tmp_path):
    lines, tiles = figures(tabulate(grid(), [LOSS]))
    assert [line["name"] for line in lines.lines if line["name"]] == ["optim=adamw", "optim=muon"]
    assert [text for _, text in lines.x_ticks] == ["0.001", "0.01"]
    assert lines.x_ticks[0][0] == pytest.approx(lines.lines[0]["dots"][0][0])
    whiskers = lines.lines[1]["path"]
    assert whiskers.count("V") == 2
    assert [tile.title for tile in tiles.tiles if tile.best] == ["muon, 0.01: 2.0500"]
    write_sheet(tmp_path / "page.html", "a <b>", [Section(title="t", charts=[lines, tiles])])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 2
    assert page.count('class="best"') == 1
    assert "a &lt;b&gt;" in page


def test_one_setting_has_curves_alone_and_none_has_no_figure():
    assert len(figures(tabulate([row({LOSS: x}, lr=x) for x in (1.0, 2.0)], [LOSS]))) == 1
    assert figures(tabulate([row({LOSS: 1.0}, seed=1)], [LOSS])) == []


def test_a_folder_without_a_sweep(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "holds no runs of a sweep" in capsys.readouterr().err
