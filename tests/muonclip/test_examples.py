"""The examples in optim/examples: two processes end with the weights of one."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from muonclip import MuonClip, QKClip, newton_schulz
from torch.distributed.tensor import DTensor

EXAMPLES = Path(__file__).parents[2] / "optim" / "examples"
STEPS = 8
MATRICES = 12  # of two blocks


def one_process(model_module) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = model_module.LanguageModel()
    clip = QKClip(model.attention_layers(), tau=1.0)
    optimizer = MuonClip(model_module.groups(model.named_parameters()), lr=0.01, qk_clip=clip)
    clipped = []
    for tokens in model_module.batches(STEPS):
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        clipped.append(float(clip.gamma.min()))
    assert min(clipped) < 1, "the clip must have something to do"
    return dict(model.named_parameters())


def of_two(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    expected = one_process(importlib.import_module("model"))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name in ("ddp", "fsdp2"):
        check(importlib.import_module(name), expected)
    dist.destroy_process_group()


def check(example, expected: dict[str, torch.Tensor]) -> None:
    calls = []

    def counting(matrices, **settings):
        calls.append(matrices.shape[:-2].numel())
        return newton_schulz(matrices, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("muonclip.orthogonalize.newton_schulz", counting)
        model, _ = example.train(STEPS)
    share = torch.tensor([sum(calls)] * 2)
    dist.all_reduce(share[:1])
    assert share[0] == STEPS * MATRICES  # each matrix once in all,
    assert 0 < share[1] < share[0]  # and shared out
    for parameter_name, parameter in model.named_parameters():
        found = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        error = torch.linalg.vector_norm(found - expected[parameter_name])
        assert error <= 1e-5 * torch.linalg.vector_norm(expected[parameter_name]), (parameter_name, error)


def test_two_processes_train_as_one(tmp_path):
    mp.spawn(of_two, args=(str(tmp_path / "store"),), nprocs=2)
