"""``k2train plan``: what a run would take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k2train.config import ConfigError, PlanConfig
from k2train.paths import atomic_write
from k2train.plan.estimate import Part, estimate, with_vocabulary
from k2train.plan.page import as_json, page, search_json, search_page
from k2train.plan.picture import picture
from k2train.plan.search import search
from k2train.status import FAILED, OK
from k2train.train.phases import build_plan


def run(config: PlanConfig) -> int:
    """Prints the plan; 0 if the run fits into the memory of the cluster's devices.

    A search shows what it has found even where the run cannot be split as its config says.

    Raises:
        ConfigError: it cannot be split so, or its phases do not fit together.
        OSError: the picture cannot be written.
    """
    config = with_vocabulary(config)
    steps = parts(config)
    searched = search(config, steps) if config.search else None
    try:
        found = estimate(config, steps)
    except ConfigError:
        if searched is not None and searched.tried:
            _print(config, search_page(searched), {"search": search_json(searched)})
        raise
    if config.picture is not None:
        atomic_write(Path(config.picture).expanduser(), picture(found))
    lines, values = page(found), as_json(found)
    if searched is not None:
        lines, values = [*lines, "", *search_page(searched)], {**values, "search": search_json(searched)}
    _print(config, lines, values)
    return OK if found.fits else FAILED


def _print(config: PlanConfig, lines: Sequence[str], values: Mapping[str, Any]) -> None:
    print(json.dumps(values, indent=2) if config.json else "\n".join(lines))


def parts(config: PlanConfig) -> list[Part]:
    """The steps that are planned, one part for each phase and size of its batch."""
    plan, found = build_plan(config), []
    for stretch in plan.stretches:
        phase = plan.phases[stretch.phase]
        if config.phase not in (None, phase.name):
            continue
        name = phase.name if len(phase.batches) == 1 else f"{phase.name}, batch {stretch.batch:,}"
        found.append(Part(name, stretch.steps, stretch.batch, phase.micro_batch_size, phase.sequence_length))
    return found
