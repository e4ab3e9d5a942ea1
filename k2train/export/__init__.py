"""The model in the layout of the released checkpoints of Kimi K2 and Moonlight."""

from k2train.export.names import Place, own_place, own_shapes, released_name, released_shapes

__all__ = ["Place", "own_place", "own_shapes", "released_name", "released_shapes"]
