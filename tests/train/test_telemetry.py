import math
import time

import pytest
import torch

from k2train.train import peak
from k2train.train.revision import revision
from k2train.train.spectrum import svd_entropy
from k2train.train.stopwatch import Stopwatch
from k2train.train.telemetry import experts, layer_of

CPU = torch.device("cpu")


def test_parts_add_up_until_they_are_taken():
    clock = Stopwatch(device=CPU)
    for _ in range(2):
        with clock.part("step"), clock.part("data"):
            time.sleep(0.01)
    clock.stop("never begun")
    found = clock.take()
    assert found.keys() == {"step", "data"}
    assert 0.02 <= found["data"] <= found["step"]
    assert clock.take() == {}


def test_a_part_that_fails_is_timed_too():
    clock = Stopwatch(device=CPU)
    with pytest.raises(KeyError), clock.part("step"):
        raise KeyError
    assert clock.take().keys() == {"step"}


def test_a_stopwatch_that_is_off_does_nothing():
    clock = Stopwatch(device=CPU, enabled=False)
    with clock.part("step"), clock.waits("communication"):
        pass
    assert clock.take() == {}


def test_experts_by_layer():
    found = experts(torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0]]), ["layers.1.mlp", "layers.2.mlp"])
    assert found == {
        "expert_load": {"layers.1": [1.0, 1.0, 1.0, 1.0], "layers.2": [4.0, 0.0, 0.0, 0.0]},
        "expert_max_violation": {"layers.1": 0.0, "layers.2": 3.0},
        "expert_dead": {"layers.1": 0.0, "layers.2": 0.75},
        "expert_entropy": {"layers.1": 1.0, "layers.2": 0.0},
    }
    nothing = experts(torch.zeros(1, 4, dtype=torch.int64), ["layers.1.mlp"])
    assert nothing["expert_load"] == {"layers.1": [None] * 4}  # as JSON has no NaN


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
def test_entropy_of_singular_values(shape):
    assert svd_entropy(torch.eye(*shape)) == pytest.approx(1)
    assert svd_entropy(torch.ones(shape)) == pytest.approx(0, abs=1e-6)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    share = torch.linalg.svdvals(matrix.double()).square()
    share /= share.sum()
    assert svd_entropy(matrix) == pytest.approx(float(-(share * share.log()).sum() / math.log(min(shape))), rel=1e-6)


@pytest.mark.parametrize("matrix", [torch.ones(1, 5), torch.full((3, 3), math.inf)])
def test_a_row_and_what_is_not_finite_have_no_entropy(matrix):
    assert math.isnan(svd_entropy(matrix))


def test_layers_of_names():
    names = ["layers.12.mlp.experts.w1", "embed_tokens.weight", "norm.weight", "layers.3.self_attn"]
    assert list(map(layer_of, names)) == ["layers.12", "embed_tokens", "norm", "layers.3"]


def test_peaks_are_listed_by_name_and_else_measured(monkeypatch):
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12}
    monkeypatch.setattr(peak, "measured_peak", lambda *_: 1.0)
    for name, expected in {**names, "something new": 1.0}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak.peak_flops(torch.device("cuda"), torch.bfloat16) == expected
    assert peak.peak_flops(torch.device("cuda"), torch.float32) == peak.peak_flops(CPU, torch.float32) == 1.0
    monkeypatch.undo()
    assert peak.measured_peak(CPU, torch.float32) > 1e8


def test_a_revision_has_a_version():
    assert revision()["version"]
