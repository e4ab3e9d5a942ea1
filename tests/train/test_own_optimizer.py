"""Which optimizers of a person's own are taken, which are refused and why."""

import inspect

import own_rules
import pytest

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import ConfigError, OptimConfig, parse
from k2train.train.own_optimizer import find_optimizer


def config(name: str, **options) -> OptimConfig:
    words = ["optim=own", f"optim.name={name}", *(f"optim.options.{key}={value}" for key, value in options.items())]
    return parse(OptimConfig, compose(TRAIN, words)["optim"])


ELEMENTWISE = ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "SGD", "ASGD", "Adadelta"]


@pytest.mark.parametrize("name", ["own_rules.Counting", *(f"torch.optim.{name}" for name in ELEMENTWISE)])
def test_rules_of_single_elements_are_taken(name):
    assert find_optimizer(config(name)).name.endswith(name.rpartition(".")[2])


def line_of(rule: type) -> int:
    lines, first = inspect.getsourcelines(rule)
    return first + len(lines) - 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ByNorm", "gives other numbers where a tensor is cut in two"),
        ("Noisy", "gives other numbers where a tensor is cut in two"),
        ("NotANumber", "gives other numbers where a tensor is cut in two"),
        ("OnMatrices", f"cannot step a 1-D tensor: IndexError: .*own_rules.py, line {line_of(own_rules.OnMatrices)}"),
        ("RememberingItself", ".* must lie in self.state"),
        ("RememberingInGroups", ".* must lie in self.state"),
        ("KeepingRows", r"keeps 'rows', a Tensor of shape \[8\], for a tensor of shape \[64\]"),
        ("WithoutDecay", "takes no weight_decay: its constructor must"),
        (
            "Failing",
            f"cannot be .*: ValueError: beta must be below 1 .*own_rules.py, line {line_of(own_rules.Failing)}",
        ),
    ],
)
def test_others_are_refused_and_told_why(name, why):
    with pytest.raises(ConfigError, match=f"optim.name=own_rules.{name} {why}") as caught:
        find_optimizer(config(f"own_rules.{name}"))
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("own_rules.Counting", {"bta": 1}, "unknown key optim.options.bta: did you mean 'beta'"),
        ("own_rules.Counting", {"lr": 1}, "optim.options.lr: lr is a key beside options"),
        ("own_rules.torch", {}, "is no torch.optim.optimizer.Optimizer"),
        ("torch.optim.LBFGS", {}, "takes no weight_decay"),
    ],
)
def test_options_are_held_against_the_constructor(name, options, why):
    with pytest.raises(ConfigError, match=why):
        find_optimizer(config(name, **options))
