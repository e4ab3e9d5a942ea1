"""The loop: the steps that are left, and who is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from k2train.train.audit import OnceEach
from k2train.train.hooks import Hook
from k2train.train.validate import HeldOutLoss

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer


def run_loop(trainer: Trainer, hooks: Sequence[Hook]) -> HeldOutLoss | None:
    """Takes all steps that are left, or those until ``trainer.stop_after_step``; called by all ranks together.

    Returns:
        The loss on all held-out text; None if the run was stopped before its end.
    """
    config, plan, progress, failed = trainer.config, trainer.plan, trainer.progress, True
    proof = OnceEach(trainer.engine, trainer.optimizer, trainer.model, trainer.state.experts)
    try:
        for hook in hooks:
            hook.start(trainer)
        while progress.step < plan.steps and not trainer.stop_after_step:
            trainer.saver.check()
            step = plan.step(progress.step)
            for hook in hooks:
                hook.before_step(step)
            applied = trainer.step()
            proof.check(applied=applied)
            for hook in hooks:
                hook.after_step(step, applied=applied)
            last = progress.step == plan.steps
            if last or _due(progress.step, config.track.log_every):
                record = trainer.record()
                for hook in hooks:
                    hook.log(record)
            if _due(progress.step, config.validate.every):
                trainer.validate(whole=False)
            if last or trainer.stop_after_step or _due(progress.step, config.checkpoint.every):
                trainer.save()
        result = trainer.validate(whole=True) if progress.step == plan.steps else None
        trainer.saver.wait()
        failed = False
    finally:
        for hook in hooks:
            hook.finish(failed=failed)
    return result


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
