"""The report: one HTML page on one run or several side by side, which needs nothing but itself.

The charts are SVG that is made here and shown without a script; fifty lines of it read values off under the pointer.
A charting library would draw more than is needed and weigh more than the run: plotly.js is 4.8 MB a page, the page of
a run of any length about 1 MB. Text goes through Jinja's escaping, and a content security policy forbids the page
to load anything.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from k2train import __version__
from k2train.config import leaves
from k2train.paths import atomic_write
from k2train.report import chart as charts
from k2train.report import telemetry
from k2train.report.chart import Chart, Level, Series, line_chart
from k2train.report.records import Record, Run, number, sentence, series, warnings
from k2train.units import count, duration, memory

# Keys of records that have a chart of their own, or need none.
KNOWN = {
    *("step", "steps", "tokens", "elapsed", "phase", "loss", "bits_per_byte", "lr", "grad_norm", "max_logit"),
    *("clipped_heads", "balance_max", "tokens_per_second"),
    *telemetry.KEYS,
}
# Keys of validations' records, in the same way.
VALIDATION = {"step", "tokens", "validation_loss", "validation_bits_per_byte"}
SAMPLES = 12  # of a run that are shown, spread evenly
INCIDENTS = 100  # of a run that are shown, the newest
LISTED = 24  # entries of a list in an incident


def write_page(page: Path, runs: Sequence[Run], *, x: str = "step") -> None:
    """Writes the report, whole or not at all.

    Args:
        page: the file.
        runs: what it is of; the first one's threshold and compressors are drawn.
        x: ``step`` or ``tokens``, the axis of the charts.

    Raises:
        OSError: it cannot be written.
    """
    atomic_write(page, render(runs, x=x))


def render(runs: Sequence[Run], *, x: str = "step") -> str:
    """The report as HTML; see ``write_page``."""
    labels = _labels(runs)
    return (
        templates()
        .get_template("page.html")
        .render(
            version=__version__,
            runs=list(zip(labels, runs, strict=True)),
            facts=_facts(runs),
            warnings=[(label, list(warnings(run))) for label, run in zip(labels, runs, strict=True)],
            sections=_sections(runs, labels, x),
            settings=_settings(runs),
            samples=[(label, _spread(run.samples, SAMPLES)) for label, run in zip(labels, runs, strict=True)],
            box=charts,
            x=x,
            listed=LISTED,
            incidents=[(label, _incidents(run)) for label, run in zip(labels, runs, strict=True) if run.incidents],
        )
    )


def templates() -> jinja2.Environment:
    """The files of this folder, in which text is escaped."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Names; with the folder where two are the same."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]


def _incidents(run: Run) -> list[tuple[str, str, list[Chart], Mapping[str, Any]]]:
    """(name, sentence, charts, other contents)."""
    newest = list(run.incidents.items())[-INCIDENTS:]
    return [
        (
            name,
            sentence(files.get("incident", {})),
            list(_course(files)),
            {file: content for file, content in files.items() if file != "curves"},
        )
        for name, files in newest
    ]


def _course(files: Mapping[str, Any]) -> Iterator[Chart]:
    """What the step of an incident was held against, and where it was out of the ordinary its own value."""
    findings = files.get("incident", {}).get("incident", {}).get("findings", [])
    own = {finding["signal"]: finding["value"] for finding in findings}
    for signal, values in files.get("curves", {}).items():
        y = [number(value) for value in (*values, *([own[signal]] if signal in own else []))]
        chart = line_chart(
            signal.replace("_", " "), "at the steps before", [Series(name=signal, x=range(1 - len(y), 1), y=y)]
        )
        if chart:
            yield chart


# ---- the table


def _facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(label, a text for each run), without rows that are empty."""
    columns = [dict(_facts_of(run)) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, [column.get(key, "-") for column in columns]) for key in keys]


def _facts_of(run: Run) -> Iterator[tuple[str, str]]:
    summary, last = run.summary or {}, run.steps[-1] if run.steps else {}
    held = run.validations[-1] if run.validations else {}
    yield "state", run.state
    yield "steps", f"{last.get('step', 0):,}"
    yield "tokens", count(number(last.get("tokens")))
    yield "loss", _four(last.get("loss"))
    yield "held-out loss", _four(summary.get("validation_loss", held.get("validation_loss")))
    yield "held-out bits per byte", _four(summary.get("validation_bits_per_byte", held.get("validation_bits_per_byte")))
    sets = summary.get("sets", held.get("sets", {}))
    for name in _sets([run]):
        found = sets.get(name, {})
        yield f"held out: {name}", f"{_four(found.get('loss'))}, {_four(found.get('bits_per_byte'))} bits per byte"
    for name, size in summary.get("compression", {}).items():
        yield f"bits per byte of {name}", _four(size)
    for name in _scores([run]):
        yield name.replace("_", " "), _four(held.get(name))
    if run.incidents:
        yield "incidents", f"{len(run.incidents):,}"
    yield "steps not applied", f"{sum(record.get('skipped_steps', 0) for record in run.steps):,}"
    logits = [v for v in series(run.steps, "max_logit") if math.isfinite(v)]
    yield "largest max logit", f"{max(logits):.1f}" if logits else "-"
    yield "records with clipped heads", f"{sum(record.get('clipped_heads', 0) > 0 for record in run.steps):,}"
    yield "training time", duration(number(last.get("elapsed")))
    elapsed = number(last.get("elapsed"))
    yield "tokens a second", count(number(last.get("tokens")) / elapsed) if elapsed > 0 else "-"
    if "parameters_total" in summary:
        total, active = summary["parameters_total"], summary["parameters_active"]
        yield "parameters", f"{count(total)}, {count(active)} active a token"
        yield "peak memory", memory(summary["peak_memory"])
        yield "machine", f"{summary['world_size']} on {summary['device']}, {summary['precision']}"
    yield "folder", str(run.folder)
    if run.damaged:
        yield "damaged lines, left out", f"{run.damaged:,}"


def _four(value: Any) -> str:
    return f"{value:.4f}" if math.isfinite(number(value)) else "-"


# ---- the charts


def _sections(runs: Sequence[Run], labels: Sequence[str], x: str) -> list[tuple[str, str, list[Chart]]]:
    """(anchor, title, charts) without those that have nothing to draw."""

    def curve(key: str, *, smooth: bool = True) -> list[Series]:
        return [
            Series(name=label, x=_axis(run.steps, x), y=series(run.steps, key), colour=index, smooth=smooth)
            for index, (label, run) in enumerate(zip(labels, runs, strict=True))
            if run.steps
        ]

    config, summary = runs[0].config, runs[0].summary or {}
    compressors = [Level(name=name, y=size) for name, size in summary.get("compression", {}).items()]
    optim = config.get("optim", {})
    tau = [Level(name="tau", y=optim["tau"])] if optim.get("name") == "muonclip" and "tau" in optim else []
    learning = [
        line_chart("loss", "nats a token", [*curve("loss"), *_held_out(runs, labels, "loss", x)]),
        line_chart(
            "bits per byte",
            "bits",
            [*curve("bits_per_byte"), *_held_out(runs, labels, "bits_per_byte", x)],
            levels=compressors,
        ),
        line_chart("learning rate", "of the schedule", curve("lr", smooth=False)),
        line_chart("gradient norm", "before clipping", curve("grad_norm"), log=True),
        *_each_set(runs, labels, x),
        *_each_score(runs, labels, x),
    ]
    named = list(zip(labels, runs, strict=True))
    attention = [
        line_chart("largest attention logit", "of all heads", curve("max_logit"), levels=tau),
        line_chart("heads clipped by QK-Clip", "heads", curve("clipped_heads", smooth=False), zero=True),
    ]
    experts = [line_chart("expert balance", "largest load / mean load, of any layer", curve("balance_max"))]
    throughput = [
        line_chart("speed", "tokens a second", curve("tokens_per_second"), zero=True),
        line_chart("utilisation", "of the peak", _where_told(curve("utilisation", smooth=False)), zero=True),
        line_chart(
            "memory", "GiB of a process, at most", _where_told(curve("memory", smooth=False), 2.0**-30), zero=True
        ),
    ]
    steps = [run.steps for run in runs]
    further = [
        line_chart(key.replace("_", " "), "", curve(key))
        for key in _keys(steps, int | float)
        if key not in KNOWN and any(number(r.get(key)) not in (0.0,) for run in runs for r in run.steps if key in r)
    ]
    arrays = [
        telemetry.array_chart(
            key if len(runs) == 1 else f"{key}, {label}", "", [(r, r[key]) for r in run.steps if key in r], x
        )
        for key in _keys(steps, Mapping | list)
        if key not in KNOWN
        for label, run in named
    ]
    found = {
        "learning": ("Learning", learning),
        "attention": ("Attention", [*attention, *telemetry.telemetry_charts("attention", named, x)]),
        "experts": ("Experts", [*experts, *telemetry.telemetry_charts("experts", named, x)]),
        "layers": ("Layers", telemetry.telemetry_charts("layers", named, x)),
        "throughput": ("Throughput", [*throughput, *telemetry.telemetry_charts("throughput", named, x)]),
        "data": ("Data", telemetry.telemetry_charts("data", named, x)),
        "further": ("Further", [*further, *arrays]),
    }
    drawn = [(anchor, title, [c for c in made if c]) for anchor, (title, made) in found.items()]
    return [section for section in drawn if section[2]]


def _axis(records: Sequence[Record], x: str) -> list[float]:
    return [float(record.get(x, record["step"])) for record in records]


def _where_told(curves: Sequence[Series], scale: float = 1.0) -> list[Series]:
    """Curves of what not every record has, without the gaps."""
    found = []
    for curve in curves:
        points = [(x, y * scale) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        if points:
            x, y = zip(*points, strict=True)
            found.append(dataclasses.replace(curve, x=x, y=y))
    return found


def _held_out(runs: Sequence[Run], labels: Sequence[str], key: str, x: str) -> list[Series]:
    """Dots for each run, and of a single run for each set where there are several."""
    found = []
    for index, (label, run) in enumerate(zip(labels, runs, strict=True)):
        if not run.validations:
            continue
        several = len(runs) > 1
        at, colour = _axis(run.validations, x), index if several else 1
        name = f"{label}, held out" if several else "held out"
        found.append(
            Series(name=name, x=at, y=series(run.validations, f"validation_{key}"), colour=colour, dots=True, dash=1)
        )
        for dash, part in enumerate(_sets([run]) if not several else (), start=2):
            found.append(Series(name=part, x=at, y=_of_set(run, part, key), colour=colour, dots=True, dash=dash))
    return found


def _each_set(runs: Sequence[Run], labels: Sequence[str], x: str) -> list[Chart | None]:
    """Of several runs with several held-out sets a chart for each set."""
    if len(runs) == 1:
        return []
    key = "bits_per_byte"
    return [
        line_chart(
            f"held out: {part}",
            "bits per byte",
            [
                Series(name=label, x=_axis(run.validations, x), y=_of_set(run, part, key), colour=index, dots=True)
                for index, (label, run) in enumerate(zip(labels, runs, strict=True))
                if run.validations
            ],
        )
        for part in _sets(runs)
    ]


def _each_score(runs: Sequence[Run], labels: Sequence[str], x: str) -> list[Chart | None]:
    """A chart for each number that records of validations have besides the loss."""
    return [
        line_chart(
            name.replace("_", " "),
            "on held-out text",
            [
                Series(name=label, x=_axis(told, x), y=series(told, name), colour=index, dots=True)
                for index, (label, run) in enumerate(zip(labels, runs, strict=True))
                if (told := [record for record in run.validations if name in record])
            ],
        )
        for name in _scores(runs)
    ]


def _scores(runs: Sequence[Run]) -> list[str]:
    return [name for name in _keys([run.validations for run in runs], int | float) if name not in VALIDATION]


def _sets(runs: Sequence[Run]) -> list[str]:
    """Names of the held-out sets where there are several."""
    names = list(dict.fromkeys(name for run in runs for record in run.validations for name in record.get("sets", {})))
    return names if len(names) > 1 else []


def _of_set(run: Run, name: str, key: str) -> list[float]:
    return [number(record.get("sets", {}).get(name, {}).get(key)) for record in run.validations]


def _keys(records: Iterable[Sequence[Record]], kind: Any) -> list[str]:
    """Keys that hold values of a kind somewhere in the records of some run, in their order."""
    return list(
        dict.fromkeys(
            key
            for of_run in records
            for record in of_run
            for key, value in record.items()
            if isinstance(value, kind) and not isinstance(value, bool)
        )
    )


# ---- settings and samples


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, a value for each run): all of one run, those that differ of several."""
    flat = [{key: json.dumps(value) for key, value in leaves(run.config)} for run in runs]
    keys = sorted({key for settings in flat for key in settings})
    rows = [(key, [settings.get(key, "absent") for settings in flat]) for key in keys]
    return [row for row in rows if len(runs) == 1 or len(set(row[1])) > 1]


def _spread(records: Sequence[Record], number_of: int) -> list[Record]:
    """So many of them, the first and the last among them."""
    if len(records) <= number_of:
        return list(records)
    return [records[round(k * (len(records) - 1) / (number_of - 1))] for k in range(number_of)]
