"""A person's own hooks, the best checkpoint, the meter, and what ``train.deterministic`` sets."""

import math
import subprocess
import sys

import pytest
import torch

from k2train.config import ConfigError, HookConfig
from k2train.train.best import Best
from k2train.train.hooks import hook_name, own_hooks
from k2train.train.metrics import LARGEST, SUMS, Meter
from k2train.train.state import Progress


def test_hooks_are_named_by_dotted_path():
    name = "own_hooks.Mine"
    (hook,) = own_hooks({"mine": HookConfig(kind=name, options={"limit": 2})})
    assert (type(hook).__name__, hook.limit) == ("Mine", 2)
    assert hook_name(hook) == name


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere.Mine", "train.hooks.first.kind=nowhere.Mine: there is no module nowhere"),
        ("own_hooks.NoHook", "is no k2train.train.hooks.Hook"),
        ("own_hooks.Mine,own_hooks.Mine", "Mine twice: a checkpoint keeps one state of a class"),
    ],
)
def test_what_is_no_hook_is_refused(path, sentence):
    names = zip(("first", "second"), path.split(","), strict=False)
    with pytest.raises(ConfigError, match=sentence):
        own_hooks({name: HookConfig(kind=kind) for name, kind in names})


def test_the_best_checkpoint():
    best = Best()
    assert not best.claims(0)  # nothing was read
    best.note(10, 2.0)
    assert not best.claims(15)  # of another step
    assert best.claims(10)
    assert best.claims(10)  # once more, as the disk has refused
    assert best.step == 0
    best.saved(10)
    assert best.step == 10
    best.note(20, 2.5)
    assert not best.claims(20)
    best.saved(20)
    best.note(25, 1.95)
    assert best.claims(25)
    assert best.state_dict()["step"] == 25  # what is saved knows of itself
    best.note(26, 2.2)  # that save has failed
    assert not best.claims(26)
    again = Best()
    again.load_state_dict(best.state_dict())
    again.note(30, math.nan)
    assert not again.claims(30)
    again.note(40, 1.9)
    assert again.claims(40)
    assert again.step == 10


def filled(meter, values):
    for value in values:
        meter.add(
            sums={name: torch.tensor(value) for name in SUMS},
            largest={name: torch.tensor(value) for name in LARGEST},
        )
        meter.count(applied=True, tokens=10, seconds=0.5)


def test_the_meter_adds_up_and_goes_on_from_its_state():
    progress = Progress()
    meter = Meter(progress, device=torch.device("cpu"))
    filled(meter, [1.0, 3.0])
    meter.fold()
    kept = meter.state_dict()
    other = Meter(Progress(), device=torch.device("cpu"))
    other.load_state_dict(kept)
    for each in (meter, other):
        filled(each, [2.0])
        each.count(applied=False, tokens=10, seconds=0.5)
        found = each.take()
        assert (found["nats"], found["max_logit"], found["steps"], found["skipped_steps"]) == (6.0, 3.0, 4, 1)
        assert (found["tokens"], found["seconds"]) == (40, 2.0)
        assert each.take()["max_logit"] == -math.inf
    assert (progress.clipped_steps, progress.max_logit) == (6, 3.0)


def test_deterministic_sets_what_it_says():
    script = """
import os, torch
from k2train.train.deterministic import make_deterministic
os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
torch.backends.cudnn.benchmark = True
make_deterministic()
assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
