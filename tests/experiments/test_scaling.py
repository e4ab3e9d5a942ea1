"""Scaling laws on sweeps whose laws are known."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from k2train.experiments.reproduction import Outcome
from k2train.experiments.scaling.cells import Place, cells
from k2train.experiments.scaling.figures import charts
from k2train.experiments.scaling.law import Form, fit
from k2train.experiments.scaling.page import cell_rows, law_lines, verdict
from k2train.experiments.scaling.runs import ScalingError, ScalingRun, Size, as_csv, read_runs
from k2train.experiments.scaling.study import study
from k2train.experiments.scaling.trend import trend

SIZES = (10_000, 30_000, 90_000, 270_000, 810_000)
TOKENS = (300_000, 1_000_000, 3_000_000, 10_000_000)
RATES = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
FULL = Form(("N", "D"), floor=True)


def true_loss(place):
    """Between Hoffmann's constants and what models of these sizes have."""
    return 0.8 + 30 / place["N"] ** 0.35 + 300 / place["D"] ** 0.45


def true_rate(place):
    return 0.9 * place["N"] ** -0.4


def places(sizes=SIZES, lengths=TOKENS):
    return [{"N": size, "D": tokens, "C": 6 * size * tokens} for size, tokens in itertools.product(sizes, lengths)]


def made(sizes=SIZES, lengths=TOKENS, rates=RATES, seeds=(1, 2), noise=0.0, loss=true_loss, **settings):
    """Runs whose loss is least at ``true_rate``, and there that of the law."""
    random = np.random.default_rng(0)
    runs = []
    for place, lr, seed in itertools.product(places(sizes, lengths), rates, seeds):
        off = math.log(lr / true_rate(place))
        runs.append(
            ScalingRun(
                name=f"run-{len(runs)}",
                size=Size(active=place["N"], total=4 * place["N"], flops=6.0 * place["N"]),
                vocabulary=256,
                tokens=place["D"],
                lr=lr,
                seed=seed,
                loss=loss(place) * math.exp(0.01 * off**2 + noise * random.standard_normal()),
                **{"batch": 1024, "others": "", "text": "a"} | settings,
            )
        )
    return runs


@pytest.fixture(scope="module")
def studied():
    return study(made(noise=0.001))


def test_constants_are_found_again():
    law = fit(FULL, places(), [true_loss(place) for place in places()], draws=10)
    truth = {"E": 0.8, "A": 30, "a": 0.35, "B": 300, "b": 0.45}
    assert law.constants == pytest.approx(truth, rel=0.02)
    far = {"N": 1e8, "D": 1e9}
    assert law.loss([far])[0] == pytest.approx(true_loss(far), rel=1e-3)


def test_an_outlier_counts_little():
    losses = [true_loss(place) for place in places()]
    losses[7] *= 1.3
    law = fit(FULL, places(), losses, draws=10)
    assert law.loss([places()[-1]])[0] == pytest.approx(true_loss(places()[-1]), rel=0.01)
    assert law.residuals[7] == pytest.approx(math.log(1.3), abs=0.02)


@pytest.mark.parametrize(
    ("noise", "sets", "draws"), [(0.01, 40, 60), pytest.param(0.003, 300, 300, marks=pytest.mark.full)]
)
def test_intervals_hold_as_often_as_they_say(noise, sets, draws):
    """Of measurements at three times the largest size 90 %, give or take three standard deviations of such a count."""
    known, beyond = places(SIZES[:4], TOKENS[:3]), places(SIZES[4:], TOKENS[2:3])
    held = 0
    for number in range(sets):
        random = np.random.default_rng(number)

        def measured(at, random=random):
            return [true_loss(place) * math.exp(noise * random.standard_normal()) for place in at]

        low, high = fit(FULL, known, measured(known), draws=draws).interval(beyond, confidence=0.9)
        held += low[0] <= measured(beyond)[0] <= high[0]
    assert abs(held / sets - 0.9) < 3 * math.sqrt(0.9 * 0.1 / sets)


def test_the_best_rates_and_their_law_are_found(studied):
    found = studied.laws
    for cell in found.cells:
        assert cell.lr.place is Place.INSIDE
        assert cell.lr.low < cell.lr.value < cell.lr.high
    assert sum(cell.lr.low < true_rate(cell.point) < cell.lr.high for cell in found.cells) >= 15  # of 20
    value, half = found.lr.exponents["N"]
    assert abs(value + 0.4) < half < 0.1
    middle, low, high = found.lr.at({"N": 1e7, "D": 1e7})
    assert low < true_rate({"N": 1e7}) < high < 1.5 * middle


def test_the_best_batch_is_found_beside_the_rate():
    def best(tokens):
        return 30 * tokens**0.33

    runs = [
        dataclasses.replace(run, batch=batch, loss=run.loss * math.exp(0.01 * math.log(batch / best(run.tokens)) ** 2))
        for run in made(SIZES[:3], TOKENS[:3], seeds=(1,))
        for batch in (512, 1024, 2048, 4096, 8192, 16384)
    ]
    laws = study(runs).laws
    assert [cell.batch.value for cell in laws.cells] == pytest.approx([best(cell.tokens) for cell in laws.cells])
    assert [cell.lr.value for cell in laws.cells] == pytest.approx([true_rate(cell.point) for cell in laws.cells])
    assert laws.batch.exponents["D"][0] == pytest.approx(0.33)
    assert laws.batch.factor == pytest.approx(30)


def test_other_settings_are_chosen_too():
    runs = made(SIZES[:1], TOKENS[:1], others="optim.weight_decay=0.1")
    worse = [dataclasses.replace(run, loss=1.01 * run.loss, others="optim.weight_decay=0") for run in runs]
    (cell,) = cells([*worse, *runs])
    assert (cell.others, cell.seeds, cell.runs) == ("optim.weight_decay=0.1", 2, 24)
    assert cell_rows([cell])[1][-1] == "optim.weight_decay=0.1"


def test_a_best_at_the_edge_is_told_and_makes_no_law():
    runs = made(sizes=SIZES[:4], rates=RATES[:4])
    found = cells(runs)
    assert {cell.lr.place for cell in found if cell.size.active == SIZES[0]} == {Place.HIGHEST}
    told = {row[0]: row[7] for row in cell_rows(found)[1:]}
    assert told["10.0k"] == "0.016, the highest tried"
    laws = study(runs).laws
    assert any("best learning rate is at the edge" in line for line in law_lines(laws))
    assert {cell.size.active for cell in laws.cells if cell.lr.place is Place.INSIDE} == set(SIZES[2:4])
    assert laws.lr is None  # of two sizes
    assert {cell.batch.place for cell in found} == {Place.ALONE}


def test_one_seed_leaves_the_rate_without_an_interval():
    best = cells(made(seeds=(1,)))[0].lr
    assert best.value == pytest.approx(true_rate({"N": SIZES[0]}))
    assert math.isnan(best.low)


def test_the_largest_size_is_foretold(studied):
    back = studied.backtest
    assert back.outcome is Outcome.HOLDS
    assert {held.cell.size.active for held in back.held_out} == {SIZES[-1]}
    assert SIZES[-1] not in {cell.size.active for cell in back.laws.cells}
    assert "4 of 4" in verdict(studied)
    assert "they say little" not in verdict(studied)
    assert len(charts(studied)) == 4


def test_a_forecast_as_wide_as_what_is_gained_is_told():
    def of_any_size(place):
        return true_loss(place | {"N": SIZES[0]})

    runs = made(SIZES[:4], TOKENS[:3], seeds=(1,), noise=0.005, loss=of_any_size)
    assert "3 of these" in verdict(study(runs))


def test_a_law_that_ends_is_seen():
    def stops(place):
        return true_loss(place | {"N": min(place["N"], SIZES[3])})

    runs = made(SIZES[1:], TOKENS[:3], seeds=(1,), noise=0.001, loss=stops)
    assert study(runs).backtest.outcome is Outcome.DOES_NOT_HOLD
    without_its_best = [run for run in runs if run.lr > RATES[1] or run.size.active < SIZES[-1]]
    assert study(without_its_best).backtest.outcome is Outcome.NOT_SHOWN


@pytest.mark.parametrize(
    ("sizes", "lengths", "form"),
    [
        (SIZES, TOKENS[:1], "L(N) = E + A / N^a"),
        (SIZES[:4], TOKENS[:1], "L(N) = A / N^a"),
        (SIZES[:3], TOKENS[:2], "L(N, D) = A / N^a + B / D^b"),
        (SIZES[:3], TOKENS[:3], "L(N, D) = E + A / N^a + B / D^b"),
    ],
)
def test_what_cells_cannot_tell_of_is_left_out(sizes, lengths, form):
    laws = study(made(sizes, lengths, noise=0.001)).laws
    assert str(laws.loss.form) == form
    assert ("floor" in laws.why) == (" = E" not in form)


def test_tokens_that_follow_sizes_are_one_effect():
    runs = [run for run in made(noise=0.001) if run.tokens == TOKENS[min(SIZES.index(run.size.active), 3)]]
    assert str(study(runs).laws.loss.form) == "L(C) = E + A / C^a"


def test_too_few_sizes_are_refused():
    with pytest.raises(ScalingError, match="2 sizes of models"):
        study(made(SIZES[:2]))
    found = study(made(SIZES[:3]))
    assert found.backtest is None
    assert "a law needs 3" in verdict(found)


def test_runs_come_back_from_csv(tmp_path):
    runs = made(SIZES[:2], TOKENS[:1], noise=0.01, others="optim.weight_decay=0.1")
    (tmp_path / "runs.csv").write_text(as_csv(runs))
    assert read_runs([tmp_path / "runs.csv"]) == (runs, 0)


def test_other_text_is_refused(tmp_path):
    runs = made(SIZES[:1], TOKENS[:1])
    (tmp_path / "a.csv").write_text(as_csv(runs))
    (tmp_path / "b.csv").write_text(as_csv([dataclasses.replace(run, text="b") for run in runs]))
    with pytest.raises(ScalingError, match="differ in their text"):
        read_runs([tmp_path / "a.csv", tmp_path / "b.csv"])


def test_another_csv_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("name,loss\nx,1\n")
    with pytest.raises(ScalingError, match=r"a\.csv is no file"):
        read_runs([tmp_path / "a.csv"])


def test_no_trend_without_points_to_spare():
    assert trend(["N"], places(SIZES[:2]), range(1, 9)) is None
    assert trend(["N", "D"], places(SIZES[:3], TOKENS[:1]), [1, 2, 3]) is None
    assert trend(["N", "D"], places(SIZES[:4], TOKENS[:1]), [1, 2, 3, 4]) is None  # of one number of tokens
