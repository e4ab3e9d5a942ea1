"""A study for programs, as JSON has it: plain values, null for what is not finite."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

from k2train.experiments.scaling.cells import CONFIDENCE
from k2train.experiments.scaling.law import Law
from k2train.experiments.scaling.study import Backtest, Laws, Study
from k2train.experiments.scaling.trend import Trend


def record(study: Study) -> dict[str, Any]:
    """All numbers of a study; intervals are (lowest, highest) and of 90 %."""
    found = {
        "confidence": CONFIDENCE,
        "cells": study.laws.cells,
        "laws": _laws(study.laws),
        "backtest": study.backtest and _backtest(study.backtest),
        "untested": study.untested,
        "forecast": study.forecast,
    }
    plain = _plain(found)
    assert isinstance(plain, dict)
    return plain


def _laws(laws: Laws) -> dict[str, Any]:
    return {
        "why": laws.why,
        "loss": _law(laws.loss),
        "compute": laws.compute and _law(laws.compute),
        "lr": laws.lr and _trend(laws.lr),
        "batch": laws.batch and _trend(laws.batch),
    }


def _law(law: Law) -> dict[str, Any]:
    return {
        "form": str(law.form),
        "constants": law.constants,
        "intervals": law.spread(confidence=CONFIDENCE),
        "residuals": law.residuals.tolist(),
    }


def _trend(law: Trend) -> dict[str, Any]:
    return {"factor": law.factor, "exponents": {name: value for name, (value, _) in law.exponents.items()}}


def _backtest(backtest: Backtest) -> dict[str, Any]:
    held_out = [{"cell": held.cell, "forecast": held.forecast, "within": held.within} for held in backtest.held_out]
    return {"outcome": backtest.outcome, "laws": _laws(backtest.laws), "held_out": held_out}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
