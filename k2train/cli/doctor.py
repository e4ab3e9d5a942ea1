"""``k2train doctor``: what is checked before a run on a cluster, on every rank."""

from __future__ import annotations

import sys
from datetime import timedelta

from k2train.config import RunConfig
from k2train.status import FAILED, OK


def run(config: RunConfig) -> int:
    """Prints a verdict on each check as it is found; 0 if nothing fails, on all ranks alike."""
    from k2train.comm import FailedTogether, close_world, open_world
    from k2train.doctor.examine import examine
    from k2train.doctor.verdicts import FAILS

    limit = timedelta(seconds=config.faults.hang_after)
    try:
        world = open_world(config.train.device, timeout=limit)
    except (ValueError, FailedTogether) as error:
        print(f"k2train: error: {error}", file=sys.stderr)
        return FAILED
    failed = False
    for verdict in examine(config, world):
        failed |= verdict.verdict == FAILS
        if world.main:
            print(f"{verdict.verdict:<8} {verdict.about:<15} {verdict.said}", flush=True)
            if verdict.remedy:
                print(f"{'':<24} -> {verdict.remedy}", flush=True)
    close_world()
    return FAILED if failed else OK
