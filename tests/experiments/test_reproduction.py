"""Verdicts, and what the analyses read off made-up runs."""

import math
from itertools import combinations

import pytest
from made_runs import incident, make_run, step, validation

from k2train.cli.multirun import run_config
from k2train.config import leaves, to_dict
from k2train.experiments.reproduction import Expectation, Findings, Outcome, Reproduction, Trial, where
from k2train.experiments.reproductions import REPRODUCTIONS, efficiency, heads, logits, sparsity, spectrum, stability
from k2train.experiments.results import page
from k2train.experiments.sweep import Row
from k2train.report import read_run

HOLDS, DOES_NOT, NOT_SHOWN = Outcome.HOLDS, Outcome.DOES_NOT_HOLD, Outcome.NOT_SHOWN


def trial(folder, settings, records, **results):
    results = {"validation_loss": 2.0, "tokens": 1000, "parameters_total": 10**6, "clipped_steps": 0} | results
    make_run(folder, records, summary=results)
    row = Row(folder=folder, settings=settings, overrides=(), choices=settings, results=results, failure=None)
    return Trial(row, read_run(folder))


@pytest.mark.parametrize(
    ("bound", "values", "outcome"),
    [
        ({"at_most": 0.8}, [0.60, 0.62, 0.64], HOLDS),
        ({"at_most": 0.8}, [0.90, 0.92, 0.94], DOES_NOT),
        ({"at_most": 0.8}, [0.79, 0.81, 0.79], NOT_SHOWN),  # a seed is beyond
        ({"at_most": 0.8}, [0.3, 0.5, 0.79], NOT_SHOWN),  # every seed is within, and the interval is not
        ({"at_most": 0.8}, [0.9, 1.5, 3.0], NOT_SHOWN),
        ({"at_most": 0.8}, [0.6], NOT_SHOWN),  # one seed has no interval
        ({"at_least": 500}, [4000, 4200, 4400], HOLDS),
        ({"at_least": 500}, [50, 55, 45], DOES_NOT),
        ({"at_most": 0}, [0, 0, 0], HOLDS),
        ({"at_most": 0}, [math.nan, 0, 0], NOT_SHOWN),
        ({"at_least": 1, "premise": True}, [1, 1, 1], HOLDS),
        ({"at_least": 1, "premise": True}, [1], HOLDS),
        ({"at_least": 1, "premise": True}, [1, 0, 1], NOT_SHOWN),
    ],
)
def test_an_expectation_is_judged_by_every_seed_and_by_the_interval(bound, values, outcome):
    assert Expectation(number="n", **bound).judge(dict(enumerate(values))) is outcome


@pytest.mark.parametrize(
    ("premise", "first", "second", "outcome"),
    [
        (1, 0, 0, HOLDS),
        (0, 0, 0, NOT_SHOWN),
        (0, 1, 1, NOT_SHOWN),  # runs that say nothing refute nothing
        (1, 0, 1, DOES_NOT),
        (1, 0, None, NOT_SHOWN),
    ],
)
def test_a_claim_holds_if_all_of_it_does(premise, first, second, outcome):
    expected = (
        Expectation(number="premise", at_least=1, premise=True),
        Expectation(number="first", at_most=0.5),
        Expectation(number="second", at_most=0.5),
    )
    claim = Reproduction(claim="", here="", runs=lambda quick: [], analyse=lambda trials: None, expected=expected)
    numbers = {"premise": dict.fromkeys((1, 2), premise), "first": dict.fromkeys((1, 2), first)}
    numbers["second"] = {1: 0, 2: 1} if second is None else dict.fromkeys((1, 2), second)
    assert claim.verdict(Findings(numbers=numbers, charts=[])) is outcome


@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_a_reproduction_has_three_seeds_of_each_arm_in_valid_runs(name):
    for quick in (True, False):
        runs = REPRODUCTIONS[name].runs(quick)
        arms = {}
        for words in runs:
            assert words[-1].startswith("seed=")
            arms.setdefault(tuple(words[:-1]), set()).add(words[-1])
        assert len(arms) >= 2
        assert min(map(len, arms.values())) >= 3
        assert len({tuple(words) for words in runs}) == len(runs)


@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_its_runs_are_valid_and_differ(name):
    quick, full = (REPRODUCTIONS[name].runs(form) for form in (True, False))
    settings = [dict(leaves(to_dict(run_config(words)))) for words in (quick[0], quick[-1], full[-1])]
    assert all(one != other for one, other in combinations(settings, 2))


def logit_trials(tmp_path, *, highest=900.0):
    def made(name, seed, tau, lr, logit, **results):
        heads = {"layers.0": [1.0, 2.0], "layers.1": [3.0, logit]}
        records = [step(n, max_logit=logit * n / 100) for n in range(1, 101)]
        records[-1] |= {"head_max_logit": heads, "clipped_heads": int(logit > logits.TAU and tau is not None)}
        settings = {"optim.tau": tau, "optim.lr": lr, "seed": seed}
        return trial(tmp_path / f"{name}{seed}", settings, records, **results)

    for seed in (2, 1):
        yield made("plain", seed, None, logits.EXCESSIVE, highest + seed, validation_loss=2.6)
        yield made("clip", seed, logits.TAU, logits.EXCESSIVE, 150.0 + seed, validation_loss=2.5, clipped_steps=9)
        yield made("sane", seed, logits.TAU, logits.SANE, 20.0)


def test_logits(tmp_path):
    findings = logits.analyse(list(logit_trials(tmp_path)))
    numbers = findings.numbers
    assert numbers[logits.PLAIN] == {1: 901, 2: 902}
    assert numbers[logits.LARGEST] == pytest.approx({1: 1.51, 2: 1.52})
    assert numbers[logits.TYPICAL] == pytest.approx({1: 1.495051, 2: 1.504952})
    assert numbers[logits.COST] == pytest.approx({1: -0.1, 2: -0.1})
    assert numbers["plain Muon's heads beyond tau at some time, of 4"] == {1: 1, 2: 1}
    assert numbers["share of MuonClip's steps with a clip, in the last quarter"] == pytest.approx({1: 0.04, 2: 0.04})
    assert [chart.title for chart in findings.charts] == [
        *("largest attention logit", "training loss"),
        *("plain Muon: layer and head", "MuonClip: layer and head"),
    ]
    assert logits.LOGITS.verdict(findings) is HOLDS


def test_where_nothing_runs_away_nothing_is_shown_of_the_clip(tmp_path):
    findings = logits.analyse(list(logit_trials(tmp_path, highest=90.0)))
    assert logits.LOGITS.verdict(findings) is NOT_SHOWN


def efficiency_trials(tmp_path, losses):
    """A run for each optimizer, learning rate and loss at the end, which falls straight from 4 over 1,000 tokens."""
    for (name, lr), end in losses.items():
        for seed in (1, 2):
            validations = [validation(n, tokens=100 * n, validation_loss=4 + (end - 4) * n / 10) for n in range(1, 11)]
            steps = [step(n, tokens_per_second=100.0 if name == "adamw" else 80.0) for n in range(1, 4)]
            settings = {"optim.name": name, "optim.lr": lr, "seed": seed}
            folder = tmp_path / f"{name}{lr}{seed}"
            yield trial(folder, settings, [*steps, *validations], validation_loss=end)


def test_efficiency(tmp_path):
    losses = {
        ("adamw", 1): 3.0,
        ("adamw", 2): 2.0,
        ("adamw", 3): 2.5,
        ("muon", 1): 3.0,
        ("muon", 2): 1.5,
        ("muon", 3): 2,
    }
    findings = efficiency.analyse(list(efficiency_trials(tmp_path, losses)))
    assert findings.numbers[efficiency.RATIO] == pytest.approx({1: 0.8, 2: 0.8})
    assert findings.numbers["1.00M parameters: time to AdamW's loss"] == pytest.approx({1: 1.0, 2: 1.0})
    assert findings.numbers[efficiency.INSIDE] == {1: 1, 2: 1}
    assert findings.numbers["1.00M parameters: Muon's best learning rate"] == {1: 2, 2: 2}


def test_a_best_learning_rate_at_the_edge_shows_nothing(tmp_path):
    losses = {("adamw", 1): 3.0, ("adamw", 2): 2.0, ("adamw", 3): 2.5, ("muon", 1): 1, ("muon", 2): 1.5, ("muon", 3): 2}
    findings = efficiency.analyse(list(efficiency_trials(tmp_path, losses)))
    assert findings.numbers[efficiency.INSIDE] == {1: 0, 2: 0}
    assert efficiency.EFFICIENCY.verdict(findings) is NOT_SHOWN


def test_an_optimizer_that_is_worse_has_a_ratio_above_one(tmp_path):
    losses = {("adamw", 1): 2.0, ("muon", 1): 3.0}
    findings = efficiency.analyse(list(efficiency_trials(tmp_path, losses)))
    assert findings.numbers[efficiency.RATIO] == pytest.approx({1: 2.0, 2: 2.0})


def test_the_trend_is_a_line_over_the_logarithm_of_the_parameters():
    found = efficiency._trend({10**6: {1: 0.6}, 10**7: {1: 0.58}})
    assert [round(values[1], 6) for values in found.values()] == [-0.02, 0.54]


def test_spectrum(tmp_path):
    def made(name, seed, gain):
        entropies = {
            "layers.0.self_attn.o_proj.weight": 0.5 + gain,
            "layers.1.self_attn.o_proj.weight": 0.7 + gain,
            "layers.1.mlp.gate.weight": 0.4 + 3 * gain,
        }
        records = [step(n, weight_entropy=entropies) for n in (1, 2)]
        return trial(tmp_path / f"{name}{seed}", {"optim.name": name, "seed": seed}, records)

    trials = [made(name, seed, gain) for name, gain in (("muon", 0.1), ("adamw", 0.0)) for seed in (1, 2)]
    numbers = spectrum.analyse(trials).numbers
    assert numbers[spectrum.EVERY] == pytest.approx({1: 0.1, 2: 0.1})
    assert numbers[spectrum.ROUTER] == pytest.approx({1: 0.2, 2: 0.2})
    assert numbers["attention, AdamW"] == pytest.approx({1: 0.6, 2: 0.6})


def test_sparsity_and_heads(tmp_path):
    def made(key, value, seed, loss):
        settings = {key: value, "seed": seed}
        return trial(tmp_path / f"{key}{value}{seed}", settings, [step(1)], validation_loss=loss, parameters_active=9)

    key, losses = "model.n_routed_experts", {8: 2.0, 16: 1.95, 32: 1.9}
    findings = sparsity.analyse([made(key, n, seed, losses[n]) for n in losses for seed in (1, 2)])
    assert findings.numbers[sparsity.GAIN] == pytest.approx({1: -0.1, 2: -0.1})
    key, losses = "model.num_attention_heads", {4: 2.0, 8: 1.98}
    findings = heads.analyse([made(key, n, seed, losses[n]) for n in losses for seed in (1, 2)])
    assert findings.numbers[heads.GAIN] == pytest.approx({1: 1.0, 2: 1.0})


def test_stability(tmp_path):
    def made(name, lr, tau, loss, *, steps=200, spikes=()):
        folder = tmp_path / f"{name}{lr}{tau}{steps}"
        settings = {"optim.name": name, "optim.lr": lr, "optim.tau": tau, "seed": 1}
        records = [step(1), *(incident(at, "a spike") for at in spikes)]
        if spikes:
            records.append({"step": 11, "tokens": 1, "incident": {"action": "warned", "sentence": "experts starve"}})
        return trial(folder, settings, records, validation_loss=loss, steps=steps, max_logit=50.0)

    losses = dict(zip(stability.RATES, (2.0, 2.1, 2.4, 3.0), strict=True))
    taus = {"muon": None, "muonclip": 100.0, "adamw": None}
    trials = [made(name, lr, taus[name], loss) for name in stability.OPTIMIZERS for lr, loss in losses.items()]
    trials += [made("muonclip", stability.RATES[2], tau, 2.2) for tau in stability.TAUS]
    trials.append(made("muonclip", 0.01, 100.0, 1.8, steps=1000, spikes=(7, 9)))
    numbers = stability.analyse(trials).numbers
    assert numbers[stability.SPIKES] == {1: 2}
    assert numbers[stability.WARNINGS] == {1: 1}
    assert numbers["adamw: largest learning rate within 0.5 nats of its best loss"] == {1: 0.1}
    assert numbers["tau 10 at 0.1: held-out loss"] == {1: 2.2}


def test_the_page_has_every_number_of_every_seed(tmp_path):
    trials = list(logit_trials(tmp_path))
    findings = logits.analyse(trials)
    text = page("logits", logits.LOGITS, findings, {"command": "`k2train reproduce logits`"})
    assert text.startswith("# logits: holds\n")
    assert "| plain Muon's largest logit >= 500 | 901 | 902 | 901.5 ± 6.4 | holds |" in text
    assert "| held-out loss of plain Muon | 2.6 | 2.6 | 2.6 ± 0 |" in text
    assert len(where(trials, optim__tau=None, seed=1)) == 1
