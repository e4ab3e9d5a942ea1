"""Faults on purpose (``inject.faults``), to test what watches a run; never part of one that is meant.

They reach the model through hooks that are there for one step, so that the step itself knows nothing of them. What is
random follows from the seed and the number of a sample, whatever the number of processes. A fault belongs to the
samples of its step, as a bad text does: a run that has gone back and leaves them out does not meet it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from k2train.comm import World
from k2train.train.phases import Step

EIGHTH = 8  # of how many samples one is a bad document
PRIME = 1_000_003  # keeps the seeds of a run's samples apart from those of the next run


class Injector:
    """Spoils steps."""

    def __init__(
        self,
        faults: Mapping[int, str],
        model: nn.Module,
        *,
        stream_number: Callable[[int], int],
        vocab_size: int,
        seed: int,
        world: World,
    ) -> None:
        """Touches nothing yet.

        Args:
            faults: by the sample of the stream that is the first of its step.
            model: that is trained.
            stream_number: of a sample that is delivered.
            vocab_size: tokens that there are.
            seed: of what is random.
            world: the run's processes.
        """
        self._faults, self._stream_number = faults, stream_number
        self._model, self._vocab_size, self._seed, self._world = model, vocab_size, seed, world

    @contextmanager
    def during(self, step: Step) -> Iterator[Step]:
        """The step as it is to be taken while this is open."""
        fault = self._faults.get(self._stream_number(step.first_sample), "")
        if fault.startswith("lr_x"):
            step = dataclasses.replace(step, lr_ratio=step.lr_ratio * float(fault.removeprefix("lr_x")))
        with ExitStack() as stack:
            if fault in SPOILS:
                stack.enter_context(_removed(self._model.register_forward_pre_hook(self._batches(step, fault))))
            elif fault in ("gradient_x1000", "gradient_nan", "loss_inf"):
                stack.enter_context(_removed(self._model.register_forward_hook(self._output(fault))))
            yield step

    def _batches(self, step: Step, fault: str) -> Callable[..., Any]:
        micro_batches = 0

        def spoil(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal micro_batches
            tokens_BT, labels_BT, *rest = inputs
            size = len(tokens_BT)
            first = (micro_batches * self._world.size + self._world.rank) * size
            micro_batches += 1
            rows = [
                torch.cat([tokens, labels[-1:].clamp(min=0)])
                for tokens, labels in zip(tokens_BT, labels_BT, strict=True)
            ]
            for place, row in enumerate(rows):
                if CHOOSES.get(fault, _all)(first + place, step.samples):
                    generator = torch.Generator().manual_seed(self._seed * PRIME + step.first_sample + first + place)
                    rows[place] = SPOILS[fault](row, self._vocab_size, generator).to(row.device)
            row_BT = torch.stack(rows)
            return row_BT[:, :-1].contiguous(), torch.where(labels_BT >= 0, row_BT[:, 1:], labels_BT), *rest

        return spoil

    def _output(self, fault: str) -> Callable[..., Any]:
        last = self._world.rank == self._world.size - 1

        def spoil(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            loss_BT, balance = output
            if fault == "loss_inf":
                return (loss_BT + torch.inf if last else loss_BT), balance
            factor = 1000.0 if fault == "gradient_x1000" else torch.nan if last else 1.0
            part: Any  # whose register_hook torch has not typed
            for part in output:
                if part.requires_grad:
                    part.register_hook(lambda gradient: gradient * factor)
            return output

        return spoil


def _random(row: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(vocab_size, row.shape, generator=generator, dtype=row.dtype)


def _repeated(row: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    return _random(row[:1], vocab_size, generator).expand(row.shape)


def _shuffled(row: Tensor, _: int, generator: torch.Generator) -> Tensor:
    return row[torch.randperm(len(row), generator=generator).to(row.device)]


# What becomes of a row of tokens.
SPOILS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "random_tokens": _random,
    "one_token": _repeated,
    "shuffled_tokens": _shuffled,
    "half_batch": _random,
    "bad_document": _random,
}


def _all(place: int, samples: int) -> bool:
    return True


# Which of the samples of a step, by their place in it.
CHOOSES: dict[str, Callable[[int, int], bool]] = {
    "half_batch": lambda place, samples: place < samples // 2,
    "bad_document": lambda place, samples: place % EIGHTH == 0,
}


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
