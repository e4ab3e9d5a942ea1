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
from k2train.config import RunConfig
from k2train.data import Dataset, Tokenizer, find_dataset, open_dataset
from k2train.model import SequenceParallel, Transformer, evaluating
from k2train.paths import cache_dir
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


def prepared_apart(config: RunConfig) -> dict[str, Path]:
    """The manifests of ``validate.data``, by name."""
    cache, limit = cache_dir(config.data.cache_dir), config.data.cache_bytes
    return {name: find_dataset(path, cache=cache, limit=limit) for name, path in config.validate.data.items()}


def held_out_sets(
    dataset: Dataset, apart: Mapping[str, Path], *, sequence_length: int, split: str = "held_out"
) -> dict[str, HeldOutSet]:
    """One set for each source that has held-out text, and those that were prepared apart.

    Args:
        dataset: of the run.
        apart: manifests by name, whose held-out text is read.
        sequence_length: T of the windows.
        split: of the dataset that is read.

    Raises:
        RunError: a set has another tokenizer, no held-out text or the name of a source.
        DataError: it cannot be opened.
    """

    def made(of: Dataset, source: str | None, split: str, *, own: bool) -> HeldOutSet:
        windows = of.windows(split, source, sequence_length=sequence_length)
        return HeldOutSet(windows, of.tokens(split, source), own)

    sources = [name for name in dataset.sources if dataset.tokens(split, name)]
    found = {name: made(dataset, name, split, own=True) for name in sources}
    for name, path in apart.items():
        key, other = f"validate.data.{name}={path}", open_dataset(path)
        if name in dataset.sources:
            raise RunError(f"{key} has the name of a source of the run's data: give it another one")
        refuse_other_tokenizer(
            key, other, sha256=dataset.manifest["tokenizer"]["sha256"], whose="the run's data", path=_path(dataset)
        )
        if not other.tokens("held_out"):
            raise RunError(f"{key} has no held-out text: prepare it with a larger data.held_out")
        found[name] = made(other, None, "held_out", own=False)
    return found


def refuse_other_tokenizer(key: str, dataset: Dataset, *, sha256: str, whose: str, path: Path) -> None:
    """Raises RunError unless a data set has the tokenizer with this hash.

    Args:
        key: that names the data set, with its value.
        dataset: as opened.
        sha256: of the tokenizer that it should have.
        whose: that is.
        path: where it lies.
    """
    if (found := dataset.manifest["tokenizer"]["sha256"]) != sha256:
        raise RunError(
            f"{key} was encoded by another tokenizer (sha256 {found}) than {whose} ({sha256}): prepare it with "
            f"data.tokenizer.kind=json data.tokenizer.path={path}"
        )


def bytes_of_tokens(tokenizer: Tokenizer) -> torch.Tensor:
    """(V,) bytes of text that each token stands for; end_of_text stands for none."""
    ids = range(tokenizer.vocab_size)
    return torch.tensor([0 if i == tokenizer.end_of_text else len(tokenizer.decode_bytes([i])) for i in ids])


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


def loss_of_sets(
    model: Transformer,
    sets: Mapping[str, HeldOutSet],
    *,
    windows: int | None,
    bytes_of_token: torch.Tensor,
    batch_size: int,
    document_mask: bool,
    world: World,
    sequence_parallel: SequenceParallel | None = None,
) -> Validation:
    """The loss on each set, and on the run's own together; called by all ranks.

    Args:
        model: as ``held_out_loss`` takes it, and all that is not named here.
        sets: by name.
        windows: of each set that are read, evenly spread; None: all.
    """
    found = {
        name: held_out_loss(
            model,
            each.windows if windows is None else evenly(each.windows, windows),
            bytes_of_token=bytes_of_token,
            batch_size=batch_size,
            document_mask=document_mask,
            world=world,
            sequence_parallel=sequence_parallel,
        )
        for name, each in sets.items()
    }
    total = joined([(found[name], each.tokens) for name, each in sets.items() if each.own])
    return Validation(total, found if len(found) > 1 else {})


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
    with evaluating(model):
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
    total_nats, total_tokens, total_bytes = sum_across([nats, tokens, size], device=world.device)
    return HeldOutLoss(total_nats, total_tokens, total_bytes)


def _path(dataset: Dataset) -> Path:
    return dataset.folder / str(dataset.manifest["tokenizer"]["file"])


def _window(windows: Sequence[Window], number: int) -> Window:
    """A window, or past the last one a blank, as every rank must run the same number of batches."""
    if number < len(windows):
        return windows[number]
    tokens, labels, starts = windows[0]
    return tokens, torch.full_like(labels, -100), starts
