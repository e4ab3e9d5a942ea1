"""The loop: the steps that are left, and who is told of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from k2train.train.audit import OnceEach
from k2train.train.faults import PatientSaver, StopRequest
from k2train.train.hooks import Hook
from k2train.train.validate import Validation
from k2train.train.watchdog import beat

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer


def run_loop(trainer: Trainer, hooks: Sequence[Hook], *, received: Callable[[], int]) -> Validation:
    """Takes all steps that are left; called by all ranks together.

    Args:
        trainer: takes them.
        hooks: are told.
        received: gives the number of the signal that asks this rank to stop, 0 for none.

    Returns:
        The loss on all held-out text.

    Raises:
        Stopped: a signal has reached one of the ranks; all raise it after the same step, which is saved if that can be.
        SaveError: the last checkpoint cannot be written.
    """
    config, plan, progress, failed = trainer.config, trainer.plan, trainer.progress, True
    every, within = config.checkpoint.every, config.faults.save_within
    saver = PatientSaver(trainer.saver, save=trainer.save, every=every, within=within, say=trainer.say)
    stop, begun = StopRequest(received), progress.step
    proof = OnceEach(trainer.engine, trainer.optimizer, trainer.model, trainer.state.experts)
    try:
        for hook in hooks:
            hook.start(trainer)
        while progress.step < plan.steps:
            saver.check(progress.step)
            step = plan.step(progress.step)
            for hook in hooks:
                hook.before_step(step)
            applied = trainer.step(before_update=stop.ask)
            proof.check(applied=applied)
            for hook in hooks:
                hook.after_step(step, applied=applied)
            if trainer.incident is not None:
                for hook in hooks:
                    hook.incident(trainer.incident)
            if trainer.go_back():
                for hook in hooks:
                    hook.rewound(progress.step)
                continue
            last = progress.step == plan.steps
            if last or _due(progress.step, config.track.log_every):
                record = trainer.record()
                for hook in hooks:
                    hook.log(record)
                for warning in trainer.warnings(record):
                    for hook in hooks:
                        hook.warning(warning)
            if _due(progress.step, config.validate.every):
                trainer.validate(whole=False)
            beat(f"saving step {progress.step}")
            if signum := stop.answer():
                raise saver.stop(signum, progress.step)
            if not last and _due(progress.step, every):
                saver.save(progress.step)
        if progress.step > begun:
            saver.save_last()
        result = trainer.validate(whole=True)
        failed = False
    finally:
        for hook in hooks:
            hook.finish(failed=failed)
    return result


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
