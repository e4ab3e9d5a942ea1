"""``k2train train --multirun``: a run for each combination of the values that are given for a key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import RunConfig, parse


def run_config(overrides: Sequence[str], own_dirs: Sequence[Path] = ()) -> RunConfig:
    """The config of ``k2train train`` with these overrides.

    Args:
        overrides: ``group=option`` and ``key=value``.
        own_dirs: folders searched for options after the shipped one.

    Raises:
        ConfigError: with all faults.
    """
    return parse(RunConfig, compose(TRAIN, overrides, own_dirs))
