"""The loss on held-out text, in bits per byte: comparable between tokenizers, and with gzip.

Each source of the run's data is a set of its own. Together they are the text that a run is judged by; a set that was
prepared apart (``validate.data``) is read beside them, and counts for nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from k2train.comm import World, sum_across
from k2train.data import Dataset, open_dataset
from k2train.model import SequenceParallel, Transformer
from k2train.train.errors import RunError
from k2train.train.watchdog import beat

Window = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, labels and starts, (T,) each


@dataclass(frozen=True)
class HeldOutLoss:
    """Of all the windows that were read, over all ranks."""

    nats: float
    tokens: float
    bytes: float

    @property
    def per_token(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of the text."""
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True)
class Validation:
    """The loss on the run's held-out text and, where there are several sets, on each of them."""

    total: HeldOutLoss
    sets: Mapping[str, HeldOutLoss]

    def per_set(self) -> dict[str, dict[str, float]]:
        """Loss and bits per byte by name of the set, fit for JSON."""
        return {n: {"loss": found.per_token, "bits_per_byte": found.bits_per_byte} for n, found in self.sets.items()}


@dataclass(frozen=True)
class HeldOutSet:
    """Text that is never trained on.

    Attributes:
        windows: predict each of its tokens once.
        tokens: of all of it.
        own: held out of the run's data, not prepared apart.
    """

    windows: Sequence[Window]
    tokens: int
    own: bool


def held_out_sets(dataset: Dataset, apart: Mapping[str, Path], *, sequence_length: int) -> dict[str, HeldOutSet]:
    """One set for each source that has held-out text, and those that were prepared apart.

    Args:
        dataset: of the run.
        apart: manifests by name, whose held-out text is read.
        sequence_length: T of the windows.

    Raises:
        RunError: a set has another tokenizer, no held-out text or the name of a source.
        DataError: it cannot be opened.
    """

    def made(of: Dataset, source: str | None, *, own: bool) -> HeldOutSet:
        windows = of.windows("held_out", source, sequence_length=sequence_length)
        return HeldOutSet(windows, of.tokens("held_out", source), own)

    sources = [name for name in dataset.sources if dataset.tokens("held_out", name)]
    found = {name: made(dataset, name, own=True) for name in sources}
    for name, path in apart.items():
        key, other = f"validate.data.{name}={path}", open_dataset(path)
        if name in dataset.sources:
            raise RunError(f"{key} has the name of a source of the run's data: give it another one")
        digests = [each.manifest["tokenizer"]["sha256"] for each in (other, dataset)]
        if digests[0] != digests[1]:
            raise RunError(
                f"{key} was encoded by another tokenizer (sha256 {digests[0]}) than the run's data ({digests[1]}): "
                f"prepare it with data.tokenizer.kind=json data.tokenizer.path={_tokenizer_path(dataset)}"
            )
        if not other.tokens("held_out"):
            raise RunError(f"{key} has no held-out text: prepare it with a larger data.held_out")
        found[name] = made(other, None, own=False)
    return found


def joined(parts: Sequence[tuple[HeldOutLoss, int]]) -> HeldOutLoss:
    """Of several sets as if they were one.

    Args:
        parts: the loss of each, and the tokens of all of the set, of which it may have read a few: it stands for all.
    """
    scaled = [(found, tokens / found.tokens) for found, tokens in parts]
    return HeldOutLoss(
        sum(found.nats * scale for found, scale in scaled),
        sum(found.tokens * scale for found, scale in scaled),
        sum(found.bytes * scale for found, scale in scaled),
    )


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
    sequence_parallel: SequenceParallel | None = None,
) -> HeldOutLoss:
    """Reads the windows, shared out over the ranks, without touching expert loads or max logits.

    Args:
        model: put into eval mode meanwhile.
        windows: (tokens_T, labels_T, starts_T) each; labels of -100 do not count.
        bytes_of_token: (V,) length in bytes of each token's text.
        batch_size: windows a rank reads at once.
        document_mask: whether attention stays inside a document.
        world: the run's processes. All of them must come here: experts may live on any of them.
        sequence_parallel: those that share out each window.
    """
    sharing = 1 if sequence_parallel is None else sequence_parallel.size
    own = slice(None) if sequence_parallel is None else sequence_parallel.part(len(windows[0][0]))
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    tokens, size = 0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():  # not inference_mode: what stage 3 gathers in it could not be trained with afterwards
        for start in range(0, len(windows), batch_size * world.size // sharing):
            beat(f"validation: window {start} of {len(windows)}")
            first = start + world.rank // sharing * batch_size
            batch = [_window(windows, number) for number in range(first, first + batch_size)]
            tokens_BT, labels_BT, starts_BT = (torch.stack(tensors) for tensors in zip(*batch, strict=True))
            tokens_BT, labels_BT = tokens_BT[:, own], labels_BT[:, own]
            counted = labels_BT[labels_BT >= 0]
            tokens += counted.numel()
            size += int(bytes_of_token[counted].sum())
            starts = starts_BT.to(world.device) if document_mask else None
            loss_BT, _ = model(tokens_BT.to(world.device), labels_BT.to(world.device), starts, sequence_parallel)
            nats += loss_BT.double().sum()
    model.train(was_training)
    total_nats, total_tokens, total_bytes = sum_across([nats, tokens, size], device=world.device)
    return HeldOutLoss(total_nats, total_tokens, total_bytes)


def _tokenizer_path(dataset: Dataset) -> Path:
    return dataset.folder / str(dataset.manifest["tokenizer"]["file"])


def _window(windows: Sequence[Window], number: int) -> Window:
    """A window, or past the last one a blank, as every rank must run the same number of batches."""
    if number < len(windows):
        return windows[number]
    tokens, labels, starts = windows[0]
    return tokens, torch.full_like(labels, -100), starts
