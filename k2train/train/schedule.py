"""The learning rate over a run: warm-up, stable, decay (WSD), as K2 was trained (arXiv 2507.20534, section 2.5)."""

from __future__ import annotations

import math

from k2train.config import ScheduleConfig


def lr_factor(step: int, *, steps: int, schedule: ScheduleConfig) -> float:
    """What the peak learning rate is multiplied with at a step.

    It rises linearly to 1 over ``warmup_steps`` (the first step is not lost on a rate of 0), stays there, and falls
    to ``final_lr_ratio`` over the last ``decay_fraction`` of the run, reaching it at the last step.

    Args:
        step: counted from 0.
        steps: of the whole run.
        schedule: its shape.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    decay_steps = round(steps * schedule.decay_fraction)
    into_decay = step + 1 - (steps - decay_steps)
    if into_decay <= 0:
        return warmup
    share = into_decay / decay_steps
    kept = 1 - share if schedule.decay_shape == "linear" else (1 + math.cos(math.pi * share)) / 2
    return warmup * (schedule.final_lr_ratio + (1 - schedule.final_lr_ratio) * kept)
