"""Which optimizers of a person's own are taken, which are refused and why."""

import dataclasses
import inspect
from pathlib import Path

import own_rules
import pytest
import torch
import torch.multiprocessing as mp

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.comm import close_world, open_world
from k2train.config import ConfigError, OptimConfig, parse
from k2train.paths import RunPaths
from k2train.train.errors import RunError
from k2train.train.own_optimizer import find_optimizer
from k2train.train.quiet import import_deepspeed
from k2train.train.trainer import Trainer
from tests.distributed.plain import Layout, config_of, prepared, write_text


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
        ("own_rules.Countng", {}, "own_rules.py. has no Countng: did you mean 'Counting'"),
        ("sys.Rule", {}, "sys .no file. has no Rule"),
    ],
)
def test_options_are_held_against_the_constructor(name, options, why):
    with pytest.raises(ConfigError, match=why):
        find_optimizer(config(name, **options))


def losses_and_weights(folder: Path, name: str, words: list[str]) -> tuple[list[float], list[torch.Tensor]]:
    config = dataclasses.replace(config_of(folder, Layout(1)), name=name)
    optim = parse(OptimConfig, compose(TRAIN, ["optim.lr=0.01", "optim.clip_grad_norm=0.5", *words])["optim"])
    paths = RunPaths(folder / "runs" / name)
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(config, optim=optim, allow_changed=("optim",))
    trainer = Trainer(config, prepared(folder), world=open_world("cpu"), paths=paths, say=lambda text: None)
    losses = [trainer.record()["loss"] for _ in range(5) if trainer.step()]
    trainer.save()
    trainer.saver.wait()
    return losses, [shard.flat.detach() for shard in trainer.state.held]


def torchs_adamw_beside_ours(_: int, folder: Path) -> None:
    import_deepspeed("cpu")
    open_world("cpu")
    write_text(folder)
    own = ["optim=own", "optim.name=torch.optim.AdamW", "optim.options.betas=[0.9,0.95]"]
    losses, weights = losses_and_weights(folder, "own", own)
    expected, wanted = losses_and_weights(folder, "ours", ["optim=adamw"])
    assert losses == pytest.approx(expected, rel=1e-6)
    assert losses[-1] < losses[0] - 0.1
    for found, right in zip(weights, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    with pytest.raises(RunError, match=r"remembers, which torch.optim.AdamW cannot go on with: begin a new run"):
        losses_and_weights(folder, "ours", own)
    close_world()


@pytest.mark.full
def test_torchs_adamw_trains_as_ours_does(tmp_path):
    mp.spawn(torchs_adamw_beside_ours, args=(tmp_path,), nprocs=1)
