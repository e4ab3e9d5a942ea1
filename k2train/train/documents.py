"""The loss of each document of a step: a bad one is named though the mean over the batch hides it.

Shapes: B sequences of a micro-batch, T tokens. A document is what of it lies in one sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.comm import World, gather_json
from k2train.data import Tokenizer, TrainStream
from k2train.data.trace import pieces
from k2train.model import document_losses

# Tokens of the loss that is expected anyway, which each document is given beside its own: three tokens that nobody
# could have known do not make a bad document (the posterior mean where a token's loss scatters four times as widely as
# a document's).
PRIOR = 16
LISTED, QUOTED, CHARACTERS = 64, 16, 2000  # documents of a process in an incident; with their text; of which so much


class DocumentLosses:
    """The losses of the step under way, which stay until the next one begins. Nothing here waits for a GPU."""

    def __init__(self, world: World) -> None:
        """Empty."""
        self._world = world
        self.begin(expected=0.0)

    def begin(self, *, expected: float) -> None:
        """A step.

        Args:
            expected: its loss, as the steps before it let expect; the same on all ranks.
        """
        self._expected, self._kept = expected, list[tuple[Tensor, Tensor, int]]()
        self._worst = torch.full((), -math.inf, device=self._world.device)

    def add(self, loss_BT: Tensor, labels_BT: Tensor, starts_BT: Tensor, *, first: int = 0) -> None:
        """A micro-batch of this rank; see ``document_losses``.

        Where sequences are shared out, losses and labels are of this rank's part, which begins at the token ``first``,
        and starts of the whole: what lies in a part is a document of its own.
        """
        self._kept.append((loss_BT, labels_BT, first))
        own_BT = starts_BT[:, first : first + loss_BT.shape[1]]
        starts_BT = (own_BT - first).clamp(min=0)
        nats_BT, tokens_BT = document_losses(loss_BT, labels_BT, starts_BT)
        mean_BT = (nats_BT + PRIOR * self._expected) / (tokens_BT + PRIOR)
        self._worst = torch.maximum(self._worst, mean_BT.masked_fill(tokens_BT == 0, -math.inf).amax())

    def worst(self) -> Tensor:
        """The largest loss of a document, of all ranks, with ``PRIOR`` tokens of what is expected; 0-d."""
        if self._world.size > 1:
            dist.all_reduce(self._worst, op=dist.ReduceOp.MAX)
        return self._worst

    def told(self, parts: Sequence[Sequence[int]], stream: TrainStream, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """The documents of the step, the worst first, fit for JSON; called by all ranks together.

        Args:
            parts: this rank's samples of each micro-batch.
            stream: that they came from.
            tokenizer: of their text.
        """
        own = sorted(self._rows(parts, stream, tokenizer), key=_badness(self._expected))
        for row in own[QUOTED:]:
            del row["text"]
        found = [row for rows in gather_json(own[:LISTED]) for row in rows]
        return sorted(found, key=_badness(self._expected))[:LISTED]

    def _rows(
        self, parts: Sequence[Sequence[int]], stream: TrainStream, tokenizer: Tokenizer
    ) -> Iterator[dict[str, Any]]:
        for numbers, (loss_BT, labels_BT, first) in zip(parts, self._kept, strict=True):
            rows = zip(numbers, loss_BT.double().cpu(), labels_BT.cpu() >= 0, strict=True)
            for number, loss_T, predicted_T in rows:
                trace, at = stream.trace(number), -first
                for index, (span, text) in enumerate(pieces(trace, tokenizer)):
                    # A window that is cut from the stream reads one token before its first label.
                    stop = at + span.stop - span.start - (index == 0 and not stream.packing)
                    here, at = slice(max(at, 0), max(stop, 0)), stop
                    tokens, nats = int(predicted_T[here].sum()), float(loss_T[here].sum())
                    if tokens:
                        yield {
                            "loss": nats / tokens if math.isfinite(nats) else None,
                            "tokens": tokens,
                            "name": f"{trace.source}/{span.document}",
                            "origin": span.origin,
                            "shard": span.shard,
                            "sample": number,
                            "span": [span.start, span.stop],
                            "text": text[:CHARACTERS],
                        }


def _badness(expected: float) -> Any:
    """What documents are sorted by: those that are not finite first, then as ``worst`` weighs them."""

    def key(row: dict[str, Any]) -> float:
        loss = row["loss"]
        return -math.inf if loss is None else -(loss * row["tokens"] + PRIOR * expected) / (row["tokens"] + PRIOR)

    return key
