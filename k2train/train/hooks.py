"""What happens beside training: a hook is told of every step, record, validation and checkpoint, and may keep a state.

The terminal, metrics.jsonl, the tracker, samples and the profiler are hooks; a person's own are named in
``train.hooks`` by the dotted path of their class, which is constructed from its ``options``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from k2train.config import ConfigError, HookConfig, own_part

if TYPE_CHECKING:
    from k2train.train.phases import Step
    from k2train.train.trainer import Trainer


class Hook:
    """Does nothing; a subclass overrides what it needs.

    Every rank has one of its own, and every method is called on all ranks at the same place, so that collectives may be
    used. A hook must leave the training alone: what it draws from torch's random numbers is not reproduced on resume.
    """

    def start(self, trainer: Trainer) -> None:
        """Before the first step of this start, when a resumed run is where it was."""

    def before_step(self, step: Step) -> None:
        """Before a step; ``step.number`` counts from 0."""

    def after_step(self, step: Step, *, applied: bool) -> None:
        """After it; ``applied`` is False if the update was refused and changed nothing."""

    def log(self, record: Mapping[str, Any]) -> None:
        """The metrics of the steps since the last record, as in metrics.jsonl; every ``track.log_every`` steps."""

    def incident(self, record: Mapping[str, Any]) -> None:
        """A step was out of the ordinary, as in metrics.jsonl; after its ``after_step``. See docs/monitor.md."""

    def rewound(self, step: int) -> None:
        """The run has gone back to so many steps, and the state of hooks with it; those after them are taken anew."""

    def warning(self, record: Mapping[str, Any]) -> None:
        """Something goes wrong slowly, as in metrics.jsonl; after the ``log`` of the record that shows it."""

    def scores(self) -> Mapping[str, float]:
        """Numbers by name that the record of a validation is to have besides; before its ``validation``."""
        return {}

    def validation(self, record: Mapping[str, Any]) -> None:
        """The loss on held-out text, as in metrics.jsonl."""

    def saved(self, step: int) -> None:
        """The checkpoint of so many steps is whole on the disk; with an asynchronous save, some steps later."""

    def finish(self, *, failed: bool) -> None:
        """After the last step of this start, or the exception that ended it."""

    def state_dict(self) -> dict[str, Any]:
        """What the next start of the run needs, fit for JSON; each rank's goes into the checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back, before ``start``, what ``state_dict`` gave on this rank; on rank 0 where there were others."""


def own_hooks(config: Mapping[str, HookConfig]) -> list[Hook]:
    """The hooks that ``train.hooks`` names, constructed.

    Raises:
        ConfigError: a path leads nowhere, or to something that is no hook, or is there twice, or the options are not
            those of its constructor.
    """
    parts = [own_part(f"train.hooks.{name}.kind", hook.kind, hook.options, base=Hook) for name, hook in config.items()]
    names = [part.name for part in parts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError([f"train.hooks has {twice} twice: a checkpoint keeps one state of a class, so subclass it"])
    return [part.make() for part in parts]


def hook_name(hook: Hook) -> str:
    """Under which a checkpoint keeps its state."""
    return f"{type(hook).__module__}.{type(hook).__qualname__}"
