"""``k2train plan``: what a run would take."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from k2train.config import PlanConfig
from k2train.paths import atomic_write
from k2train.plan.estimate import Part, estimate, with_vocabulary
from k2train.plan.page import as_json, page, search_page
from k2train.plan.picture import picture
from k2train.plan.search import search
from k2train.status import FAILED, OK
from k2train.train.phases import build_plan


def run(config: PlanConfig) -> int:
    """Prints the plan; 0 if the run fits into the memory of the cluster's devices.

    Raises:
        ConfigError: the run cannot be split so, or its phases do not fit together.
        OSError: the picture cannot be written.
    """
    config = with_vocabulary(config)
    steps = parts(config)
    found = estimate(config, steps)
    searched = search(config, steps) if config.search else None
    if config.picture is not None:
        atomic_write(Path(config.picture).expanduser(), picture(found))
    if config.json:
        json.dump(as_json(found, searched), sys.stdout, indent=2)
        print()
    else:
        lines = page(found)
        if searched is not None:
            lines += ["", *search_page(searched)]
        print("\n".join(lines))
    return OK if found.fits else FAILED


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
