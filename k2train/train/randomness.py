"""The random generators of a process. Training draws nothing from them, but what a user adds to it may."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from k2train.comm import pack_json, unpack_json


def seed_generators(seed: int, *, rank: int, step: int) -> None:
    """Seeds Python's, numpy's and torch's by what decides a run, other numbers for each rank and each start."""
    words = [int(word) for word in np.random.SeedSequence([seed, rank, step]).generate_state(2, np.uint64)]
    random.seed(words[0])
    np.random.seed(words[0] % 2**32)
    torch.manual_seed(words[1])  # of all GPUs too


def generator_states(device: torch.device) -> torch.Tensor:
    """Where all generators of this process are, as bytes of JSON (uint8, 1-D)."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
    }
    if device.type == "cuda":
        states["cuda"] = bytes(torch.cuda.get_rng_state(device).numpy()).hex()
    return pack_json(states)


def set_generator_states(packed: torch.Tensor, device: torch.device) -> None:
    """The inverse of ``generator_states``; a GPU that was not there then keeps its own."""
    states = unpack_json(packed)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_bytes(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_bytes(states["cuda"]), device)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
