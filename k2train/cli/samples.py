"""Text that the model writes while it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from k2train.config import GenerateConfig
from k2train.generate import sample_text
from k2train.train.hooks import Hook
from k2train.train.metrics import keep_records

if TYPE_CHECKING:
    from k2train.train.phases import Step
    from k2train.train.trainer import Trainer


class Samples(Hook):
    """Every so many steps the same prompt and seed; a line of JSON each in ``samples.jsonl``."""

    def __init__(self, config: GenerateConfig, path: Path, *, every: int) -> None:
        self._config, self._path, self._every = config, path, every

    def start(self, trainer: Trainer) -> None:
        """Drops what an earlier start wrote of steps that come again."""
        self._trainer = trainer
        self.rewound(trainer.progress.step)

    def rewound(self, step: int) -> None:
        """Drops what was written of steps that come again."""
        if self._trainer.world.main and self._every:
            keep_records(self._path, until=step)

    def after_step(self, step: Step, *, applied: bool) -> None:
        """Writes one, all ranks together, as experts may live on any."""
        done, trainer = step.number + 1, self._trainer
        if not self._every or done % self._every:
            return
        try:
            text = sample_text(trainer.model, trainer.dataset.tokenizer, self._config, trainer.world.device)
        except ValueError as error:  # a model that has diverged
            text = f"no sample: {error}"
        if trainer.world.main:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": done, "text": text}) + "\n")
