"""Charts of what a record says of each head, layer, expert, source and part of the time (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k2train.report.chart import Chart, Series, heat_map, line_chart
from k2train.report.records import Record, Run, number

FEW = 8  # entries up to which they are drawn as curves, not as a heat map
# By section, in its order: key, title and unit.
SECTIONS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "attention": (
        ("head_max_logit", "largest logit of each head", "layer.head"),
        ("head_clip", "clip events", "1 - gamma of QK-Clip"),
        ("head_scale", "all clips of a head together", "1 - product of gamma"),
        ("head_max_logit_exact", "upper bounds among the logits", "1: a bound"),
    ),
    "experts": (
        ("expert_load", "load of each expert", "of the mean; layer.expert"),
        ("expert_max_violation", "maximal violation by layer", "largest load / mean - 1"),
        ("expert_entropy", "entropy of routing by layer", "1 is even"),
        ("expert_dead", "experts without a token by layer", "share"),
    ),
    "layers": (
        ("layer_grad_norm", "gradient norm by layer", "before clipping"),
        ("layer_update_rms", "update RMS by layer", "before the learning rate"),
        ("layer_weight_rms", "weight RMS by layer", ""),
        ("weight_entropy", "SVD entropy of the weights", "1: all directions alike"),
    ),
    "throughput": (("seconds", "where the time goes", "seconds a step"),),
    "data": (("source_tokens", "tokens by source", ""),),
}
# What is 1 where nothing is to be seen: drawn as the distance from that, as heat maps show the largest of what they
# join.
FROM_ONE = ("head_clip", "head_scale", "head_max_logit_exact")
KEYS = {key for charts in SECTIONS.values() for key, _, _ in charts} | {"utilisation", "memory"}


def telemetry_charts(section: str, runs: Sequence[tuple[str, Run]], x: str) -> list[Chart | None]:
    """The charts of a section, of each run in turn.

    Args:
        section: of ``SECTIONS``.
        runs: with their labels.
        x: ``step`` or ``tokens``.
    """
    found = []
    for key, title, unit in SECTIONS[section]:
        for label, run in runs:
            end = "" if len(runs) == 1 else f", {label}"
            values: list[tuple[Record, Any]] = [(record, record[key]) for record in run.steps if key in record]
            if key in FROM_ONE:
                values = [(record, {n: 1 - number(v) for n, v in _entries(value)}) for record, value in values]
                if not any(v > 0 for _, value in values for v in value.values()):
                    continue
            if key == "head_max_logit":
                found.append(array_chart(f"largest logit of each layer{end}", "", by_layer(run.steps, key), x))
            found.append(array_chart(title + end, unit, values, x))
    return found


def by_layer(records: Sequence[Record], key: str) -> list[tuple[Record, Mapping[str, Any]]]:
    """Of what has a list for each layer the largest of it."""
    found: list[tuple[Record, Mapping[str, Any]]] = []
    for record in records:
        if isinstance(value := record.get(key), Mapping):
            rows = {n: [v for v in row if v is not None] for n, row in value.items() if isinstance(row, list)}
            found.append((record, {layer: max(row, default=None) for layer, row in rows.items()}))
    return found


def array_chart(title: str, unit: str, values: Sequence[tuple[Record, Any]], x: str) -> Chart | None:
    """Curves of a few entries, a heat map of many.

    Args:
        title: of the chart.
        unit: of the values.
        values: of records, each a number for each entry, by whatever path.
        x: ``step`` or ``tokens``.
    """
    entries = [dict(_entries(value)) for _, value in values]
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    at = [float(record.get(x, record["step"])) for record, _ in values]
    rows = [(_row_name(name), [number(entry.get(name)) for entry in entries]) for name in names]
    if len(rows) <= FEW:
        return line_chart(title, unit, [Series(name=n, x=at, y=y, colour=i) for i, (n, y) in enumerate(rows)])
    return heat_map(title, unit or f"{len(rows)} rows", at, rows)


def _row_name(path: str) -> str:
    """Without what says nothing: a matrix of layer 3 is ``3.q_b_proj``."""
    for part in ("layers.", "self_attn.", "mlp.", ".weight"):
        path = path.replace(part, "")
    return path


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield name, value
        return
    for key, item in pairs:
        yield from _entries(item, f"{name}.{key}" if name else str(key))
