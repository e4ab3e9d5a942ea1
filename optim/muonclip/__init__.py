"""MuonClip, the optimizer of Kimi K2 (arXiv 2507.20534), for any training loop; needs torch alone.

Names are imported when they are first used, so that ``muonclip.ownership`` can be used without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muonclip.groups import split_parameters
    from muonclip.optimizer import MuonClip
    from muonclip.orthogonalize import POLAR_EXPRESS, QUINTIC, newton_schulz
    from muonclip.plan import Piece
    from muonclip.qk_clip import ClippableAttention, QKClip
    from muonclip.sharded import FlatLayout

__all__ = [
    "POLAR_EXPRESS",
    "QUINTIC",
    "ClippableAttention",
    "FlatLayout",
    "MuonClip",
    "Piece",
    "QKClip",
    "newton_schulz",
    "split_parameters",
]

# No module is named as what it exports: importing it would put the module in the place of the function.
_HOMES = {
    "POLAR_EXPRESS": "orthogonalize",
    "QUINTIC": "orthogonalize",
    "ClippableAttention": "qk_clip",
    "FlatLayout": "sharded",
    "MuonClip": "optimizer",
    "Piece": "plan",
    "QKClip": "qk_clip",
    "newton_schulz": "orthogonalize",
    "split_parameters": "groups",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'muonclip' has no attribute {name!r}")
    return getattr(import_module(f"muonclip.{_HOMES[name]}"), name)
