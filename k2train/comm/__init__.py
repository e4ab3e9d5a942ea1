"""Processes: which one this is, which others there are, and what they tell each other."""

from k2train.comm.exchange import (
    FailedTogether,
    gather_json,
    pack_json,
    start_max,
    sum_across,
    together,
    unpack_json,
)
from k2train.comm.first import main_first
from k2train.comm.world import World, close_world, open_store, open_world

__all__ = [
    "FailedTogether",
    "World",
    "close_world",
    "gather_json",
    "main_first",
    "open_store",
    "open_world",
    "pack_json",
    "start_max",
    "sum_across",
    "together",
    "unpack_json",
]
