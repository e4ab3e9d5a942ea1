"""Next lines and syntax: of a model while it is trained, and for ``k2train evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from k2train.config import GenerateConfig, ValidateConfig
from k2train.data import Dataset
from k2train.generate import FullPasses, Question, ask, longest_text, next_line_accuracy, valid_syntax
from k2train.train.hooks import Hook
from k2train.train.validate import evenly
from k2train.train.watchdog import beat

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer


class Suite(Hook):
    """Scores that the record of a validation has where ``validate.questions`` or ``validate.samples`` ask for them."""

    def __init__(self, config: ValidateConfig, generate: GenerateConfig) -> None:
        self._config, self._generate = config, generate

    def start(self, trainer: Trainer) -> None:
        """Makes the questions, which stay the same."""
        self._trainer = trainer
        length = trainer.config.train.sequence_length
        self._questions = ask_of(trainer.dataset, "held_out", number=self._config.questions, length=length)

    def scores(self) -> Mapping[str, float]:
        """Asks and samples, all ranks together, as experts may live on any."""
        trainer, found = self._trainer, {}
        model, tokenizer, device = trainer.model, trainer.dataset.tokenizer, trainer.world.device
        if self._config.questions:
            beat("validation: next lines")
            found["next_line_accuracy"] = next_line_accuracy(
                model,
                tokenizer,
                self._questions,
                batch_size=trainer.config.train.micro_batch_size,
                length=trainer.config.train.sequence_length,
                device=device,
            )
        if number := self._config.samples:
            beat("validation: samples")
            found["valid_syntax"] = valid_syntax(FullPasses(model, device), tokenizer, self._generate, number=number)
        return found


def ask_of(dataset: Dataset, split: str, *, number: int, length: int) -> list[Question]:
    """Questions of so many pieces of a split, evenly spread over all sources; at most one of each.

    Args:
        dataset: whose text it is.
        split: of it.
        number: of pieces.
        length: of a context, in tokens: a piece is twice as long, and what is asked lies in its second half.
    """
    windows = dataset.windows(split, sequence_length=2 * length)
    chosen = evenly(windows, number) if number else []
    return ask(longest_text(tokens, dataset.tokenizer) for tokens, _, _ in chosen)
