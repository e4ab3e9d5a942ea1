"""The proof of an export: transformers loads it, every key of it, and gives the logits that our model gives."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from k2train.config import ModelConfig
from k2train.export.architecture import ExportError
from k2train.export.names import released_shapes
from k2train.export.write import own_tensors
from k2train.model import Transformer
from k2train.units import memory

TOKENS = 64
TOLERANCE = 1e-4  # of the largest logit, or of 1
# Both models in fp32, and what loading needs beside them.
BYTES_A_NUMBER = 2 * 4 * 1.25


def why_not(config: ModelConfig) -> str | None:
    """Why the check cannot be made here; None if it can."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    needed = BYTES_A_NUMBER * sum(torch.Size(s).numel() for s in released_shapes(own_tensors(config)).values())
    if needed > (free := _free_memory()):
        return f"it takes {memory(needed)} of memory and {memory(free)} are free"
    return None


def check_export(folder: Path, model: Transformer) -> str:
    """Loads the folder with transformers and compares logits of random tokens.

    Args:
        folder: the export.
        model: ours in fp32, with weights rounded as those of the folder are.

    Returns:
        A sentence on what was found.

    Raises:
        ExportError: a tensor is missing, left over or misshapen, or the logits differ.
    """
    import transformers

    loader: Any = transformers.AutoModelForCausalLM
    vocabulary, length = model.head_weight.shape[0], min(TOKENS, model.config.max_position_embeddings)
    tokens = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    with _silence(transformers), torch.no_grad():
        theirs, report = loader.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            attn_implementation="eager",
            experts_implementation="eager",  # the other takes no odd sizes
        )
        if faults := {what: names for what, names in report.items() if names}:
            raise ExportError(f"{folder}: transformers does not find every tensor in its place: {faults}")
        expected, found = theirs.eval()(input_ids=tokens).logits, model.eval().logits(tokens)
    difference, largest = float((expected - found).abs().max()), float(found.abs().max())
    sentence = (
        f"{type(theirs).__name__} of transformers {transformers.__version__} has every tensor, and its logits of "
        f"{length} tokens differ by at most {difference:.1e} from ours in fp32 (the largest logit is {largest:.3g})"
    )
    if not difference <= TOLERANCE * max(1.0, largest):
        raise ExportError(f"{folder}: {sentence}, which is more than rounding")
    return sentence


def _free_memory() -> float:
    """Bytes that a process may still take on this machine."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


@contextlib.contextmanager
def _silence(transformers: Any) -> Iterator[None]:
    """Its warnings and progress bars are of no help to who exports."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
