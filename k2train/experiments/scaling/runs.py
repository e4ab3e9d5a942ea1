"""Finished runs as laws see them: how large, on how much text, with which settings, to which loss.

They are read from the folders of sweeps, or from the CSV that such runs were written to.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2train.config import ModelConfig, RunConfig, is_harmless, leaves, parse, to_dict
from k2train.experiments.sweep import Row, Settings, read_rows
from k2train.plan.count import active, causal_keys, parameters, total, work
from k2train.report.records import read_config

# Settings of the text: losses on other text are other things, and so are those in other contexts.
TEXT = ("data.", "train.sequence_length", "train.document_mask", "schedule.phases")
# What is told of a run in columns of its own.
TOLD = (*TEXT, "schedule.steps", "schedule.tokens", "optim.lr", "train.global_batch_size", "seed")


class ScalingError(ValueError):
    """No law can be fitted, or none says what was asked; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a model: parameters without embedding and head, which grow with the vocabulary and not with the model.

    Attributes:
        active: used for a token.
        total: of all experts.
        flops: operations of training for a token, head and attention included, as ``k2train plan`` counts.
    """

    active: int
    total: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class ScalingRun:
    """A finished run.

    Attributes:
        name: of its folder.
        size: of its model.
        vocabulary: of its model.
        tokens: that it was trained on.
        lr: the peak.
        batch: tokens a step.
        seed: of weights and order.
        others: settings that differ between runs of one size and number of tokens and are none of these, as
            ``key=value``.
        text: a hash of the settings of its text; only runs with the same are compared.
        loss: nats a token on all held-out text, at the end.
    """

    name: str
    size: Size
    vocabulary: int
    tokens: int
    lr: float
    batch: int
    seed: int
    others: str
    text: str
    loss: float


def size_of(model: ModelConfig, *, length: int) -> Size:
    """The size of a model that is trained on sequences of ``length`` tokens; ``vocab_size`` is a number."""
    inner = [p for p in parameters(model) if p.role not in ("embedding", "head")]
    flops = work(model, keys=causal_keys(length)).training
    return Size(active=active(inner, model), total=total(inner), flops=flops)


def text_of(config: RunConfig) -> str:
    """The hash of what decides a run's text."""
    return _hash(dict(leaves(to_dict(config))))


def read_runs(paths: Sequence[Path]) -> tuple[list[ScalingRun], int]:
    """The finished runs of sweeps, and how many others there are.

    Args:
        paths: folders of sweeps, and files of ``as_csv``.

    Raises:
        ScalingError: there is no finished run, or they were not trained on the same text.
        ConfigError: a run is of another version of k2train, with other settings.
        OSError: a file cannot be read.
    """
    rows = [row for path in paths if path.suffix != ".csv" for row in read_rows(path)]
    finished = [row for row in rows if row.results and _finite(row.results.get("validation_loss"))]
    found = [run for path in paths if path.suffix == ".csv" for run in _read_csv(path)]
    found += _with_others([_run(row) for row in finished], [row.settings for row in finished])
    if not found:
        raise ScalingError(
            f"{', '.join(map(str, paths))}: no finished run of a sweep ({len(rows)} that are not finished); "
            "`k2train train --multirun` makes some"
        )
    if other := next((run for run in found if run.text != found[0].text), None):
        raise ScalingError(
            f"{found[0].name} and {other.name} differ in their text (data.*, train.sequence_length, "
            "train.document_mask, schedule.phases), so that their losses cannot be compared: fit each by itself"
        )
    return found, len(rows) - len(finished)


def as_csv(runs: Sequence[ScalingRun]) -> str:
    """A line for each run, from which ``read_runs`` reads the same."""
    text = io.StringIO()
    lines = [_flat(run) for run in runs]
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(run: ScalingRun) -> dict[str, Any]:
    values = dataclasses.asdict(run)
    return {"name": values.pop("name"), **values.pop("size"), **values}


def _read_csv(path: Path) -> list[ScalingRun]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                ScalingRun(
                    name=line["name"],
                    size=Size(active=int(line["active"]), total=int(line["total"]), flops=float(line["flops"])),
                    vocabulary=int(line["vocabulary"]),
                    tokens=int(line["tokens"]),
                    lr=float(line["lr"]),
                    batch=int(line["batch"]),
                    seed=int(line["seed"]),
                    others=line["others"],
                    text=line["text"],
                    loss=float(line["loss"]),
                )
                for line in csv.DictReader(file)
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise ScalingError(
            f"{path} is no file that `k2train scale` has written ({error}): give a sweep's folder"
        ) from error


def _run(row: Row) -> ScalingRun:
    assert row.results is not None, "the run is finished"
    settings, length = row.settings, int(row.settings["train.sequence_length"])
    mapping = read_config(row.folder)["model"]
    bare, one = (parse(ModelConfig, {**mapping, "vocab_size": size}) for size in (1, 2))
    # The model's size is that of its vocabulary times the width, once or twice, and the rest.
    every = total(parameters(one)) - total(parameters(bare))
    vocabulary = 1 + (int(row.results["parameters_total"]) - total(parameters(bare))) // every
    model = dataclasses.replace(bare, vocab_size=vocabulary)
    return ScalingRun(
        name=row.folder.name,
        size=size_of(model, length=length),
        vocabulary=vocabulary,
        tokens=int(row.results["tokens"]),
        lr=float(settings["optim.lr"]),
        batch=int(settings["train.global_batch_size"]) * length,
        seed=int(settings["seed"]),
        others="",
        text=_hash(settings),
        loss=float(row.results["validation_loss"]),
    )


def _with_others(runs: Sequence[ScalingRun], every: Sequence[Settings]) -> list[ScalingRun]:
    """The runs with ``others``, read off their settings."""
    groups: dict[Any, list[Settings]] = {}
    for run, settings in zip(runs, every, strict=True):
        groups.setdefault((run.size, run.tokens), []).append(settings)
    differing = sorted({key for group in groups.values() for key in _differing(group)})
    return [
        dataclasses.replace(
            run, others=" ".join(f"{key}={settings.get(key)}" for key in differing if not _follows(settings, key))
        )
        for run, settings in zip(runs, every, strict=True)
    ]


def _differing(every: Sequence[Settings]) -> list[str]:
    """Keys of settings that decide what is learnt, that runs differ in, and that have no column of their own."""
    return [
        key
        for key in {key for settings in every for key in settings}
        if not is_harmless(key)
        and not key.startswith(TOLD)
        and any(settings.get(key) != every[0].get(key) for settings in every)
    ]


def _follows(settings: Settings, key: str) -> bool:
    """Whether it is the learning rate of a role that is the run's own."""
    return key.endswith(".lr") and settings.get(key) == settings["optim.lr"]


def _hash(settings: Settings) -> str:
    """Without what is empty, so that a key of a later version, which is null here, leaves it as it is."""
    text = {key: value for key, value in settings.items() if key.startswith(TEXT) and value and not is_harmless(key)}
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()[:10]


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)
