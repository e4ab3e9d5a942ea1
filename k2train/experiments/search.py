"""A search over settings by Optuna: a sweep whose runs are chosen by the results of those before.

The study lies in ``study.log`` beside the runs. Each draw is seeded by its number, so that a search which was stopped,
and goes on, tries what it would have tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from k2train.experiments.sweep import Row

RESULT = "validation_loss"  # is made as small as it can be


def search(
    folder: Path,
    space: Mapping[str, BaseDistribution],
    *,
    trials: int,
    batch: int,
    run: Callable[[Sequence[Mapping[str, Any]]], Sequence[Row]],
) -> optuna.Study:
    """Runs trials until there are so many.

    Args:
        folder: of the study.
        space: what is searched, by keys.
        trials: in all, with those of earlier starts and those whose runs fail.
        batch: drawn at a time, before the result of any of them is known.
        run: runs trials, given by their settings, and returns their rows in the same order.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    study = optuna.create_study(study_name="sweep", storage=storage, load_if_exists=True)
    while True:
        drawn = len(study.trials)
        begun = bool(study.get_trials(states=[TrialState.RUNNING]))  # by an earlier start
        wanted = min(trials, drawn + (-drawn % batch if begun else batch))
        for number in range(drawn, wanted):
            study.sampler = optuna.samplers.TPESampler(seed=number)
            study.ask(dict(space))
        open_trials = study.get_trials(states=[TrialState.RUNNING])
        if not open_trials:
            return study
        for trial, row in zip(open_trials, run([trial.params for trial in open_trials]), strict=True):
            if row.results is None:
                study.tell(trial.number, state=TrialState.FAIL)
            else:
                study.tell(trial.number, row.results[RESULT])
