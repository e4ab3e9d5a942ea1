"""The tensors of a released checkpoint (DeepseekV3ForCausalLM's layout) and ours, one to one.

A released tensor bears the name of ours with ``model.`` before it, but for ``lm_head.weight``, which has no prefix, and
the routed experts: ours are stacked, ``layers.N.mlp.experts.w1`` [E, I, D] (gate), ``w3`` [E, I, D] (up) and ``w2``
[E, D, I] (down), and the released ones are a matrix each, ``model.layers.N.mlp.experts.E.gate_proj.weight`` and so on,
numbered from 0. No number is changed or transposed. The router's selection bias, a buffer, is among them. Pure: no
torch, and nothing of a config, so that it holds for every architecture of k2train.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

Shape = tuple[int, ...]

_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_STACKS = {projection: stack for stack, projection in _PROJECTIONS.items()}
_STACK = re.compile(r"(layers\.\d+\.mlp\.experts)\.(w1|w3|w2)")
_EXPERT = re.compile(r"model\.(layers\.\d+\.mlp\.experts)\.(0|[1-9]\d*)\.(gate_proj|up_proj|down_proj)\.weight")
_HEAD = "lm_head.weight"
_PREFIX = "model."
# How each other tensor's name begins, without the prefix.
_OTHERS = re.compile(
    r"(embed_tokens|norm|layers\.(0|[1-9]\d*)\.(?!mlp\.experts\.)\w+(\.\w+){0,2})\.weight"
    r"|layers\.(0|[1-9]\d*)\.mlp\.gate\.e_score_correction_bias"
)


class Place(NamedTuple):
    """Where a released tensor lies in our model.

    Attributes:
        name: of the parameter or buffer.
        expert: its number in the stack of all experts; None where the tensor is the whole.
    """

    name: str
    expert: int | None = None


def released_name(place: Place) -> str:
    """The name of a tensor in a released checkpoint.

    Raises:
        ValueError: there is no such place: an unknown name, a stack without a number, or a number without a stack.
    """
    name, expert = place
    if stack := _STACK.fullmatch(name):
        if expert is None or expert < 0:
            raise ValueError(f"{name} is a stack of experts, given with expert={expert}: name one of them, from 0 on")
        return f"{_PREFIX}{stack[1]}.{expert}.{_PROJECTIONS[stack[2]]}.weight"
    if expert is not None:
        raise ValueError(f"{name} with expert={expert} is no stack of experts: give expert=None")
    if name == _HEAD:
        return name
    if _OTHERS.fullmatch(name):
        return _PREFIX + name
    raise ValueError(f"{name} is no tensor of a k2train model: give a name as its state_dict does")


def own_place(name: str) -> Place:
    """The inverse of ``released_name``.

    Raises:
        ValueError: a released checkpoint has no tensor of this name.
    """
    if name == _HEAD:
        return Place(name)
    if expert := _EXPERT.fullmatch(name):
        return Place(f"{expert[1]}.{_STACKS[expert[3]]}", int(expert[2]))
    own = name.removeprefix(_PREFIX)
    if own != name and _OTHERS.fullmatch(own):
        return Place(own)
    raise ValueError(
        f"{name} is no tensor of the released layout in bf16 or fp32 (an fp8 release has scales beside its weights: "
        f"dequantise it first), where names are {_HEAD}, {_PREFIX}embed_tokens.weight, "
        f"{_PREFIX}norm.weight and {_PREFIX}layers.N..., with experts as mlp.experts.E.gate_proj.weight"
    )


def released_shapes(own: Mapping[str, Shape]) -> dict[str, Shape]:
    """Name and shape of every tensor in the released layout.

    Args:
        own: of all our parameters and saved buffers, with the experts of all processes in each stack.
    """
    released: dict[str, Shape] = {}
    for name, shape in own.items():
        if _STACK.fullmatch(name):
            released |= {released_name(Place(name, expert)): shape[1:] for expert in range(shape[0])}
        else:
            released[released_name(Place(name))] = shape
    return released


def own_shapes(released: Mapping[str, Shape]) -> dict[str, Shape]:
    """The inverse of ``released_shapes``.

    Raises:
        ValueError: a name is unknown, an expert of a stack is missing, or the experts of a stack differ in shape.
    """
    own: dict[str, Shape] = {}
    stacks: dict[str, dict[int, Shape]] = {}
    for name, shape in released.items():
        place = own_place(name)
        if place.expert is None:
            own[place.name] = shape
        else:
            stacks.setdefault(place.name, {})[place.expert] = shape
    for name, shapes in stacks.items():
        if missing := sorted(set(range(max(shapes) + 1)) - shapes.keys()):
            raise ValueError(
                f"{released_name(Place(name, missing[0]))} is missing, though experts of higher number are there"
            )
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"the experts of {name} have different shapes, {sorted(set(shapes.values()))}: one is needed"
            )
        own[name] = (len(shapes), *shapes[0])
    return own
