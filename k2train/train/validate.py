"""The loss on held-out text, in bits per byte: comparable between tokenizers, and with gzip."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from k2train.comm import World, sum_across
from k2train.model import Transformer
from k2train.train.watchdog import beat

Window = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, labels and starts, (T,) each


@dataclass(frozen=True)
class HeldOutLoss:
    """Of all the windows that were read, over all ranks."""

    nats: float
    tokens: int
    bytes: int

    @property
    def per_token(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of the text."""
        return self.nats / math.log(2) / self.bytes


def joined(parts: Iterable[HeldOutLoss]) -> HeldOutLoss:
    """Of several sets as if they were one."""
    found = list(parts)
    return HeldOutLoss(sum(p.nats for p in found), sum(p.tokens for p in found), sum(p.bytes for p in found))


def evenly(windows: Sequence[Window], number: int) -> list[Window]:
    """``number`` of the windows, or all if they are fewer, evenly spread: so that a few still see all of the text."""
    number = min(len(windows), number)
    return [windows[i * len(windows) // number] for i in range(number)]


def held_out_loss(
    model: Transformer,
    windows: Sequence[Window],
    *,
    bytes_of_token: torch.Tensor,
    batch_size: int,
    document_mask: bool,
    world: World,
) -> HeldOutLoss:
    """Reads the windows, shared out over the ranks, without touching expert loads or max logits.

    Args:
        model: put into eval mode meanwhile.
        windows: (tokens_T, labels_T, starts_T) each; labels of -100 do not count.
        bytes_of_token: (V,) length in bytes of each token's text.
        batch_size: windows a rank reads at once.
        document_mask: whether attention stays inside a document.
        world: the run's processes. All of them must come here: experts may live on any of them.
    """
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    tokens, size = 0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():  # not inference_mode: what stage 3 gathers in it could not be trained with afterwards
        for start in range(0, len(windows), batch_size * world.size):
            beat(f"validation: window {start} of {len(windows)}")
            first = start + world.rank * batch_size
            batch = [_window(windows, number) for number in range(first, first + batch_size)]
            tokens_BT, labels_BT, starts_BT = (torch.stack(tensors) for tensors in zip(*batch, strict=True))
            counted = labels_BT[labels_BT >= 0]
            tokens += counted.numel()
            size += int(bytes_of_token[counted].sum())
            starts = starts_BT.to(world.device) if document_mask else None
            loss_BT, _ = model(tokens_BT.to(world.device), labels_BT.to(world.device), starts)
            nats += loss_BT.double().sum()
    model.train(was_training)
    total_nats, total_tokens, total_bytes = sum_across([nats, tokens, size], device=world.device)
    return HeldOutLoss(total_nats, int(total_tokens), int(total_bytes))


def _window(windows: Sequence[Window], number: int) -> Window:
    """A window, or past the last one a blank, as every rank must run the same number of batches."""
    if number < len(windows):
        return windows[number]
    tokens, labels, starts = windows[0]
    return tokens, torch.full_like(labels, -100), starts
