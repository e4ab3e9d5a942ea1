import dataclasses

import pytest
import torch

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import RunConfig, parse
from k2train.model import Transformer, build_model
from k2train.train.compile import Compiled
from k2train.train.errors import RunError


@pytest.fixture
def model() -> Transformer:
    torch._dynamo.reset()
    config = parse(RunConfig, compose(TRAIN, ["model=nano"])).model
    return build_model(dataclasses.replace(config, vocab_size=300, num_hidden_layers=1), seed=0)


def test_a_machine_without_a_compiler_is_told_at_the_start(model: Transformer, tmp_path):
    nothing = {"cpp.cxx": (None, str(tmp_path / "no-such-g++")), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(nothing),
        pytest.raises(RunError, match=r"^train.compile=true but .*No working C\+\+ compiler.*set train.compile=false$"),
    ):
        Compiled(model, device=torch.device("cpu"))


def test_torch_compile_that_is_switched_off_is_told_at_the_start(model: Transformer):
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(RunError, match=r"does not work here .* unset; or"),
    ):
        Compiled(model, device=torch.device("cpu"), backend="aot_eager")


@pytest.mark.parametrize("silent", [False, True])
def test_a_step_that_compiled_nothing_stops_the_run(model: Transformer, silent: bool, monkeypatch):
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    if silent:  # what torch.compile is with TORCHDYNAMO_DISABLE=1
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compiled = Compiled(model, device=torch.device("cpu"), backend="aot_eager")
    with pytest.raises(RunError, match="compiled nothing"):  # the attempt at the start does not count
        compiled.check()
    loss, _ = model(tokens, tokens)
    loss.sum().backward()
    if silent:
        with pytest.raises(RunError, match=r"^train.compile=true but a step compiled nothing.*compile=false$"):
            compiled.check()
    else:
        compiled.check()
