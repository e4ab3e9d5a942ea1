"""The audit of a step: right updates pass, in a plain loop and on shards, and every kind of wrong one is found."""

import dataclasses
import math

import pytest
import torch
from muonclip import FlatLayout, MuonClip, Piece, QKClip, newton_schulz
from muonclip.audit import StepAudit, adamw_fault, adamw_rms, orthogonalized_singular_values, rules
from muonclip.orthogonalize import QUINTIC
from torch import nn

SHAPES = {"matrix": (12, 20), "experts": (3, 10, 6), "low_rank": (16, 8), "head": (7, 5), "bias": (9,)}
MUON = ("matrix", "experts", "low_rank")


class Layer:
    """Clips the rows of ``matrix``: two heads of six."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.max_logits = weight, torch.tensor([0.5, 40.0])

    def reset_max_logits(self) -> None:
        self.max_logits = torch.full((2,), -math.inf)

    def row_scales(self, gamma_H, *, alpha=0.5):
        yield self.weight, gamma_H.repeat_interleave(6)


def build(dtype: torch.dtype = torch.float32, **settings) -> tuple[dict[str, nn.Parameter], MuonClip]:
    torch.manual_seed(0)
    params = {name: nn.Parameter((0.02 * torch.randn(shape)).to(dtype)) for name, shape in SHAPES.items()}
    groups = [
        {"params": [(n, params[n]) for n in MUON], "algorithm": "muon", "role": "mlp"},
        {"params": [(n, params[n]) for n in SHAPES if n not in MUON], "algorithm": "adamw", "weight_decay": 0.0},
    ]
    clip = QKClip([("attention", Layer(params["matrix"]))], tau=10.0)
    for name, p in params.items():
        p.grad = 1e-3 * torch.randn_like(p)
        if name == "low_rank":
            p.grad = p.grad[:, :1] @ p.grad[:1]
    return params, MuonClip(groups, lr=0.01, qk_clip=clip, **settings)


def faults(audit: StepAudit) -> list[str]:
    found = [f"{m.name} {m.number}: {fault}" for m in audit.matrices if (fault := m.fault())]
    for name in dict.fromkeys(e.name for e in audit.elements):
        if fault := adamw_fault([e for e in audit.elements if e.name == name]):
            found.append(f"{name}: {fault}")
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"nesterov": False}, {"newton_schulz_coefficients": QUINTIC[:3]}, {"dtype": torch.float64}]
)
def test_a_right_step_passes(settings):
    _, optimizer = build(**settings)
    with StepAudit(optimizer) as audit:
        optimizer.step()
    assert faults(audit) == []
    keys = [("experts", 0), ("experts", 1), ("experts", 2), ("low_rank", 0), ("matrix", 0)]
    assert sorted((m.name, m.number) for m in audit.matrices) == keys
    by_name = {m.name: m for m in audit.matrices}
    if "newton_schulz_coefficients" not in settings:
        for name in ("matrix", "experts"):  # full rank: what theory says of the quintic
            assert 0.65 < by_name[name].singular[0] < by_name[name].singular[1] < 1.21
            assert 0.15 < by_name[name].rms < 0.25
    assert by_name["low_rank"].singular[0] < 1e-3  # a zero stays one, and the RMS shows the rank
    assert by_name["low_rank"].rms == pytest.approx(by_name["low_rank"].singular[1] * 0.2 / 8**0.5, rel=1e-3)
    assert max(m.error for m in audit.matrices) < 1e-3
    found, expected = adamw_rms([e for e in audit.elements if e.name == "bias"])
    assert found == pytest.approx(expected, rel=1e-4) == pytest.approx(1, rel=0.01)


def test_rules_say_how_each_parameter_is_updated():
    _, optimizer = build()
    optimizer.param_groups[0]["lr"] = 0.5
    found = {rule.name: rule for rule in rules(optimizer)}
    assert list(found) == list(SHAPES)
    assert [len(found[n].matrices) for n in SHAPES] == [1, 3, 1, 0, 0]
    assert [found[n].role for n in SHAPES] == ["mlp"] * 3 + ["adamw"] * 2
    assert (found["matrix"].lr, found["bias"].lr, found["matrix"].weight_decay) == (0.5, 0.01, 0.1)
    assert found["experts"].scales == pytest.approx((0.2 * 10**0.5,) * 3)


def test_bfloat16_is_held_to_what_it_can_do():
    _, optimizer = build(newton_schulz_dtype=torch.bfloat16)
    with StepAudit(optimizer) as audit:
        optimizer.step()
    assert faults(audit) == []
    assert not any(m.exact for m in audit.matrices)
    (one,) = [m for m in audit.matrices if m.name == "matrix"]
    assert dataclasses.replace(one, singular=(0.7, 1.4)).fault() == "singular value 1.4 above 1.3"
    assert dataclasses.replace(one, rms=0.1).fault().startswith("RMS 0.1, expected 0.1")


def sharded_step(change=lambda optimizer: None) -> StepAudit:
    """On the shards of one process, padding included."""
    params, optimizer = build()
    layouts = {}
    for group, names in zip(optimizer.param_groups, (MUON, ("head", "bias")), strict=True):
        flat = nn.functional.pad(torch.cat([params[n].detach().flatten() for n in names]), (0, 5))
        flat.grad = nn.functional.pad(torch.cat([params[n].grad.flatten() for n in names]), (0, 5))
        offset, pieces = 0, []
        for n in names:
            pieces.append(Piece(n, SHAPES[n], 0, params[n].numel(), offset))
            offset += params[n].numel()
        group["params"], layouts[flat] = [flat], FlatLayout((tuple(pieces),), 0, None)
    optimizer.shard(layouts)
    with StepAudit(optimizer) as audit:
        change(optimizer)
        optimizer.step()
    return audit


def test_blocks_of_a_split_parameter_are_matrices_of_their_own():
    _, optimizer = build(split={"matrix": (4, 8), "experts": (3, SHAPES["experts"][1] - 3)})
    with StepAudit(optimizer) as audit:
        optimizer.step()
    assert faults(audit) == []
    assert sorted(m.number for m in audit.matrices if m.name == "experts") == list(range(6))
    found = {rule.name: rule for rule in rules(optimizer)}
    columns = SHAPES["matrix"][1]
    assert found["matrix"].matrices == ((4, columns), (8, columns))


def test_shards_give_what_whole_parameters_give():
    _, optimizer = build()
    with StepAudit(optimizer) as plain:
        optimizer.step()
    found = sharded_step()
    assert faults(found) == []
    expected = {(m.name, m.number): m for m in plain.matrices}
    assert len(found.matrices) == len(expected)
    for m in found.matrices:
        assert m.singular == pytest.approx(expected[m.name, m.number].singular, abs=1e-4)
    assert [(e.name, e.elements) for e in found.elements] == [(e.name, e.elements) for e in plain.elements]


def no_newton_schulz(matrices, **settings):
    return matrices / matrices.norm(dim=(-2, -1), keepdim=True)


def twice(matrices, **settings):
    return newton_schulz(newton_schulz(matrices, **settings), **settings)


@pytest.mark.parametrize("wrong", [no_newton_schulz, twice, lambda m, **settings: 1.2 * newton_schulz(m, **settings)])
def test_a_wrong_orthogonalisation_is_found(monkeypatch, wrong):
    monkeypatch.setattr("muonclip.orthogonalize.newton_schulz", wrong)
    _, optimizer = build()
    with StepAudit(optimizer) as audit:
        optimizer.step()
    assert any(fault.startswith("matrix 0: singular values off by") for fault in faults(audit))


def test_other_wrong_updates_are_found():
    params, optimizer = build()
    with StepAudit(optimizer) as audit:
        optimizer.step()
        with torch.no_grad():
            params["experts"][1] -= 1e-3 * torch.randn(10, 6)
            params["bias"][3] += 1e-3
    assert [fault.split(":")[0] for fault in faults(audit)] == ["experts 1", "bias"]

    params, optimizer = build()
    params["experts"].grad = None
    with StepAudit(optimizer) as audit:
        optimizer.step()
    assert faults(audit) == [f"experts {n}: orthogonalised 0 times" for n in range(3)]

    def step_before(optimizer: MuonClip) -> None:
        optimizer.param_groups[0]["lr"] = 0.02  # a second step, at another rate
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.01

    assert "matrix 0: orthogonalised 2 times" in faults(sharded_step(step_before))

    params, optimizer = build()
    params["matrix"].grad[0, 0] = math.nan
    with StepAudit(optimizer) as audit:
        optimizer.step()
    assert faults(audit) == ["matrix 0: not finite"]


def test_only_a_first_step_can_be_audited():
    _, optimizer = build()
    optimizer.step()
    with pytest.raises(ValueError, match="momentum from earlier"):
        StepAudit(optimizer)


def test_counting_ends_with_the_audit():
    _, optimizer = build()
    with pytest.raises(RuntimeError), StepAudit(optimizer):
        raise RuntimeError
    assert optimizer.orthogonalized is None


def test_the_polynomial_acts_on_each_singular_value():
    matrix = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(newton_schulz(matrix, dtype=torch.float64))
    torch.testing.assert_close(orthogonalized_singular_values(matrix, QUINTIC), expected)
    assert torch.equal(orthogonalized_singular_values(0 * matrix, QUINTIC), torch.zeros(6, dtype=torch.float64))
