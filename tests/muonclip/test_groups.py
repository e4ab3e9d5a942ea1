"""Named parameters into groups by role."""

import pytest
import torch
from muonclip import split_parameters


def parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.zeros(2, 2)) for name in ("embed.weight", "up.weight", "down.weight")}


ROLES = {"embed.weight": "embedding", "up.weight": "mlp", "down.weight": "mlp"}


def test_groups_are_complete_and_in_order():
    named = parameters()
    groups = split_parameters(named.items(), ROLES)
    assert [group["role"] for group in groups] == ["embedding", "mlp"]
    assert [name for group in groups for name, _ in group["params"]] == list(named)
    assert all(parameter is named[name] for group in groups for name, parameter in group["params"])


def test_a_parameter_without_a_role_is_named():
    with pytest.raises(ValueError, match=r"down\.weight has no role"):
        split_parameters(parameters().items(), {n: r for n, r in ROLES.items() if n != "down.weight"})


def test_a_role_without_a_parameter_is_named():
    with pytest.raises(ValueError, match=r"'head' is given to lm_head\.weight"):
        split_parameters(parameters().items(), ROLES | {"lm_head.weight": "head"})


def test_one_tensor_under_two_names_is_named():
    named = parameters()
    named["down.weight"] = named["up.weight"]
    with pytest.raises(ValueError, match=r"up\.weight and down\.weight are one tensor"):
        split_parameters(named.items(), ROLES)
