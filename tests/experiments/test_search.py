"""A search, with a function that stands in for the runs."""

from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from k2train.experiments.search import RESULT, search
from k2train.experiments.sweep import Row

SPACE = {"lr": FloatDistribution(1e-4, 1.0, log=True), "optim": CategoricalDistribution(["muon", "adamw"])}


class Runs:
    """Gives each trial a loss that is smallest at 0.01 with muon; stops before the call of this number ends."""

    def __init__(self, stop=None):
        self.batches, self.stop = [], stop

    def __call__(self, trials):
        if len(self.batches) == self.stop:
            raise KeyboardInterrupt
        self.batches.append(trials)
        return [self.row(**trial) for trial in trials]

    def row(self, lr, optim):
        loss = abs(lr - 0.01) + (optim == "adamw")
        return Row(Path("r"), {}, [], {}, {RESULT: loss} if lr < 0.5 else None, None)


def test_a_search_that_was_stopped_tries_what_it_would_have_tried(tmp_path):
    whole, first, second = Runs(), Runs(stop=2), Runs()
    found = search(tmp_path / "whole", SPACE, trials=10, batch=3, run=whole)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "stopped", SPACE, trials=10, batch=3, run=first)
    search(tmp_path / "stopped", SPACE, trials=10, batch=3, run=second)
    assert first.batches + second.batches == whole.batches
    assert [len(batch) for batch in whole.batches] == [3, 3, 3, 1]
    assert len(found.trials) == 10
    again = Runs()
    search(tmp_path / "whole", SPACE, trials=10, batch=3, run=again)
    assert again.batches == []


def test_it_finds_what_is_good_and_bears_failures(tmp_path):
    found = search(tmp_path, SPACE, trials=25, batch=1, run=Runs())
    assert found.best_params["optim"] == "muon"
    assert found.best_value < 0.01
    assert {trial.state.name for trial in found.trials} <= {"COMPLETE", "FAIL"}
