"""A plan as a page of text, and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from k2train.plan.communication import by_kind
from k2train.plan.estimate import Estimate, PhaseEstimate
from k2train.plan.search import Found, headroom
from k2train.units import count, duration, memory

BAR = 32  # columns
SHOWN = 10  # ways of splitting a run
DAY = 86400


def page(found: Estimate) -> list[str]:
    """Lines of text."""
    config, layout = found.layout.config, found.layout
    cluster, fullest = config.cluster, found.fullest
    ep, sp = layout.expert_parallel, layout.sequence_parallel
    lines = [
        f"{config.name}: {found.parameters:,} parameters, {count(found.active)} used for a token, "
        f"{count(fullest.work.training)}FLOPs to train on one",
        f"{layout.ranks:,} devices ({cluster.nodes} x {cluster.devices_per_node}), "
        f"{'bf16' if layout.bf16 else 'fp32'}, ZeRO-{layout.zero_stage}, experts over {ep}, sequences over {sp}, "
        f"activation checkpointing {config.train.activation_checkpointing}",
        "",
        f"Memory of a device, phase {fullest.part.name} (micro-batch {fullest.part.micro_batch} x "
        f"{fullest.part.length:,} tokens)",
        *_memory(fullest),
        "",
        f"Given to collectives in a step, by a rank, phase {fullest.part.name}",
        *(_bars(by_kind(list(fullest.traffic)), memory) or ["  nothing"]),
        "",
        f"Time of a step, phase {fullest.part.name}",
        *_bars(fullest.time.parts, _seconds),
        "",
        *_phases(found.phases),
        "",
        f"In all: {count(found.tokens)} tokens, {found.flops:.3g} FLOPs, {found.seconds / DAY:,.3g} days, "
        f"{count(found.device_hours)} device-hours, {_money(found.dollars)}; "
        f"utilisation {found.utilisation:.1%} of {count(found.phases[0].time.peak)}FLOP/s a device",
        f"Data: as many tokens if none is to be seen twice, {memory(found.data_bytes)} of shards",
    ]
    if config.optim.own:
        lines += ["", f"{config.optim.name} is your own: it is taken to keep two fp32 numbers a weight, as AdamW does"]
    if not found.fits:
        lines += ["", f"It does not fit: {headroom(found)} a device. --search tries other ways of splitting it."]
    return lines


def _memory(phase: PhaseEstimate) -> list[str]:
    held = phase.memory
    other = "passes" if held.work is held.update else "update"
    elsewhere = min(sum(held.passes.values()), sum(held.update.values()))
    lines = _bars(held.components, memory)
    lines.append(
        f"  {'total':<34} {memory(held.total):>9}  of {memory(held.capacity)}; the {other}, at another time: "
        f"{memory(elsewhere)} of its own"
    )
    if held.host:
        lines.append(f"  {'in the host, of a process':<34} {memory(sum(held.host.values())):>9}")
    return lines


def _phases(phases: Sequence[PhaseEstimate]) -> list[str]:
    rows = [("phase", "steps", "tokens", "length", "a step", "tokens/s a device", "utilisation", "memory", "days")]
    for one in phases:
        rows.append(
            (
                one.part.name,
                f"{one.part.steps:,}",
                count(one.part.tokens),
                f"{one.part.length:,}",
                f"{one.time.step:.3g} s",
                f"{one.step.rank_tokens / one.time.step:,.0f}",
                f"{one.time.utilisation:.1%}",
                memory(one.memory.total) + ("" if one.memory.fits else " (too much)"),
                f"{one.seconds / DAY:,.3g}",
            )
        )
    return _table(rows)


def search_page(found: Found) -> list[str]:
    """Lines of text: the best, and why others do not fit."""
    lines = [f"{found.tried} ways of splitting it, {len(found.fitting)} fit"]
    if found.fitting:
        rows = [("days", "utilisation", "memory", "overrides")]
        rows += [
            (
                f"{one.seconds / DAY:,.3g}",
                f"{one.utilisation:.1%}",
                headroom(one),
                " ".join(candidate.overrides),
            )
            for candidate, one in found.fitting[:SHOWN]
        ]
        lines += _table(rows)
    elif found.closest:
        candidate, one = found.closest
        lines.append(f"  the closest: {headroom(one)} with {' '.join(candidate.overrides)}")
    if found.reasons:
        lines += ["", "Those that do not fit, by what they need at least"]
        needs = [
            (memory(reason.least), f"{reason.ways} x", what)
            for what, reason in sorted(found.reasons.items(), key=lambda item: item[1].least)
        ]
        lines += _table(needs[:SHOWN])
        if len(needs) > SHOWN:
            lines.append(f"  and {len(needs) - SHOWN} reasons more")
    return lines


def as_json(found: Estimate) -> dict[str, Any]:
    """The same for programs: bytes, seconds and FLOPs. Its keys are a promise; see docs/plan.md."""
    return {
        "name": found.layout.config.name,
        "parameters": found.parameters,
        "active_parameters": found.active,
        "devices": found.layout.ranks,
        "tokens": found.tokens,
        "data_bytes": found.data_bytes,
        "flops": found.flops,
        "seconds": found.seconds,
        "device_hours": found.device_hours,
        "dollars": found.dollars,
        "utilisation": found.utilisation,
        "fits": found.fits,
        "phases": [_phase_json(phase) for phase in found.phases],
    }


def search_json(found: Found) -> dict[str, Any]:
    """What a search has found, for programs."""
    return {
        "tried": found.tried,
        "fitting": [
            {"overrides": candidate.overrides, "seconds": one.seconds, "memory": one.fullest.memory.total}
            for candidate, one in found.fitting
        ],
        "reasons": {what: asdict(reason) for what, reason in found.reasons.items()},
    }


def _phase_json(phase: PhaseEstimate) -> dict[str, Any]:
    held = phase.memory
    return {
        "name": phase.part.name,
        "steps": phase.part.steps,
        "tokens": phase.part.tokens,
        "sequence_length": phase.part.length,
        "flops_per_token": phase.work.training,
        "memory": {
            "state": dict(held.state),
            "passes": dict(held.passes),
            "update": dict(held.update),
            "host": dict(held.host),
            "fragmentation": held.fragmentation,
            "reserved": held.reserved,
            "total": held.total,
            "capacity": held.capacity,
        },
        "traffic": by_kind(list(phase.traffic)),
        "step_seconds": phase.time.step,
        "step_parts": phase.time.parts,
        "utilisation": phase.time.utilisation,
    }


def _bars(values: Mapping[str, float], text: Callable[[float], str]) -> list[str]:
    """A line for each value that is not 0, with a bar as long as its share of all."""
    whole = sum(values.values())
    return [
        f"  {name:<34} {text(value):>9}  {'█' * round(BAR * value / whole)}".rstrip()
        for name, value in values.items()
        if value
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _seconds(value: float) -> str:
    return duration(value) if value >= 1 else f"{1e3 * value:.3g} ms"


def _money(dollars: float | None) -> str:
    return "no price given (cluster.dollars_per_hour)" if dollars is None else f"${dollars:,.0f}"
