"""QK-Clip: the rule, its effect on plain multi-head and latent attention, and what it must survive."""

import math

import pytest
import torch
from muonclip import MuonClip, QKClip
from muonclip.qk_clip import clip_factors, scale_rows_
from torch import nn


class MultiHead(nn.Module):
    """Plain multi-head logits, with a bias on the query."""

    def __init__(self, heads: int = 4, head_dim: int = 8, width: int = 32) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.q = nn.Linear(width, heads * head_dim)
        self.k = nn.Linear(width, heads * head_dim, bias=False)
        self.register_buffer("max_logits", torch.full((heads,), -math.inf))

    def logits_HTT(self, x_TD):
        q, k = (f(x_TD).view(-1, self.heads, self.head_dim).transpose(0, 1) for f in (self.q, self.k))
        return q @ k.mT / self.head_dim**0.5

    def forward(self, x_TD):
        logits_HTT = self.logits_HTT(x_TD)
        if self.training:
            self.max_logits = torch.maximum(self.max_logits, logits_HTT.detach().amax((1, 2)))
        return logits_HTT

    def reset_max_logits(self):
        self.max_logits = torch.full_like(self.max_logits, -math.inf)

    def row_scales(self, gamma_H):
        rows = gamma_H.sqrt().repeat_interleave(self.head_dim)
        yield from ((self.q.weight, rows), (self.q.bias, rows), (self.k.weight, rows))


class Latent(MultiHead):
    """Logits of latent attention (K2, section 2.1): a rope key that all heads share must not be scaled."""

    def __init__(self, heads: int = 4, nope: int = 8, rope: int = 4, width: int = 32) -> None:
        nn.Module.__init__(self)
        self.heads, self.nope, self.rope = heads, nope, rope
        self.q = nn.Linear(width, heads * (nope + rope), bias=False)
        self.kv = nn.Linear(width, heads * 2 * nope, bias=False)  # per head [nope key | value]
        self.k_rope = nn.Linear(width, rope, bias=False)
        self.register_buffer("max_logits", torch.full((heads,), -math.inf))

    def logits_HTT(self, x_TD):
        T = len(x_TD)
        q_nope, q_rope = self.q(x_TD).view(T, self.heads, -1).transpose(0, 1).split([self.nope, self.rope], -1)
        k_nope = self.kv(x_TD).view(T, self.heads, -1).transpose(0, 1)[..., : self.nope]
        return (q_nope @ k_nope.mT + q_rope @ self.k_rope(x_TD).mT) / (self.nope + self.rope) ** 0.5

    def row_scales(self, gamma_H):
        root, full = gamma_H.sqrt()[:, None].expand(-1, self.nope), gamma_H[:, None].expand(-1, self.rope)
        yield self.q.weight, torch.cat((root, full), 1).flatten()
        yield self.kv.weight, torch.cat((root, torch.ones_like(root)), 1).flatten()


def optimizer_of(layers: dict[str, nn.Module], *, lr: float = 0.0, **clip) -> MuonClip:
    named = [(f"{name}.{n}", p) for name, layer in layers.items() for n, p in layer.named_parameters()]
    groups = [{"params": [(n, p) for n, p in named if p.ndim == 2], "algorithm": "muon"}]
    if vectors := [(n, p) for n, p in named if p.ndim == 1]:
        groups.append({"params": vectors, "algorithm": "adamw"})
    return MuonClip(groups, lr=lr, qk_clip=QKClip(list(layers.items()), **clip))


@pytest.mark.parametrize("kind", [MultiHead, Latent])
def test_the_max_of_each_head_becomes_the_smaller_of_itself_and_tau(kind):
    torch.manual_seed(0)
    layer, x = kind(), 3 * torch.randn(16, 32)
    with torch.no_grad():  # heads of very different size
        for weight, rows in layer.row_scales(torch.tensor([0.5, 2.0, 60.0, 300.0])):
            weight.mul_(rows.view(-1, *[1] * (weight.ndim - 1)))
    optimizer = optimizer_of({"attention": layer}, tau=20.0)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    largest = layer(x).detach().amax((1, 2))
    clipped = largest > 20
    assert 0 < clipped.sum() < 4  # both kinds of heads are there
    optimizer.step()
    torch.testing.assert_close(layer.logits_HTT(x).amax((1, 2)), largest.clamp(max=20), atol=1e-4, rtol=0)
    torch.testing.assert_close(optimizer.qk_clip.max_logits[0], largest)
    torch.testing.assert_close(optimizer.qk_clip.gamma[0], torch.where(clipped, 20 / largest, 1.0))
    for name, p in layer.named_parameters():  # heads at or below tau: bit for bit; k_rope: all of it
        if name == "k_rope.weight":
            assert torch.equal(p, before[name])
        else:
            rows = p.shape[0] // 4
            for head in (~clipped).nonzero().flatten().tolist():
                part = slice(head * rows, (head + 1) * rows)
                assert torch.equal(p[part], before[name][part])
    if kind is Latent:  # values are no part of any logit
        old, new = (w.view(4, 2, 8, 32)[:, 1] for w in (before["kv.weight"], layer.kv.weight))
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("largest", "gamma"),
    [
        (200.0, 0.5),
        (3e38, 100 / 3e38),
        *((untouched, 1.0) for untouched in (100.0, 99.0, 0.0, -5.0, -1000.0, math.inf, -math.inf, math.nan)),
    ],
)
def test_gamma(largest, gamma):
    found = clip_factors(torch.tensor([largest]), tau=100.0).item()
    assert math.isclose(found, gamma, rel_tol=1e-6)
    assert gamma != 1 or found == 1


def test_maxima_that_are_not_numbers_leave_the_weights_alone_and_are_reported():
    layer = MultiHead()
    optimizer = optimizer_of({"attention": layer}, tau=1.0)
    before = [p.detach().clone() for p in layer.parameters()]
    layer.max_logits = torch.tensor([math.nan, math.inf, -math.inf, -3.0])
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))
    assert optimizer.qk_clip.max_logits.tolist() == [[math.inf, math.inf, -math.inf, -3.0]]
    assert optimizer.qk_clip.gamma.tolist() == [[1.0] * 4]


def test_step_gathers_and_resets_by_itself():
    layer = MultiHead()
    optimizer = optimizer_of({"attention": layer}, tau=1.0)
    layer.max_logits = torch.tensor([4.0, 0.5, 0.5, 0.5])
    optimizer.step()
    assert layer.max_logits.tolist() == [-math.inf] * 4
    assert optimizer.qk_clip.gamma.tolist() == [[0.25, 1.0, 1.0, 1.0]]  # readable after the reset
    weight = layer.q.weight.detach().clone()
    optimizer.step()  # no forward pass in between: nothing is scaled twice
    assert torch.equal(layer.q.weight, weight)


def test_a_caller_that_gathers_has_one_gamma_for_many_steps_and_resets_itself():
    layer = MultiHead()
    optimizer = optimizer_of({"attention": layer}, tau=1.0)
    clip, groups = optimizer.qk_clip, optimizer.param_groups
    layer.max_logits = torch.tensor([4.0, 0.5, 0.5, 0.5])
    weight, bias = layer.q.weight.detach().clone(), layer.q.bias.detach().clone()
    clip.gather()
    for group in groups:  # as ZeRO does
        optimizer.param_groups = [group]
        optimizer.step()
    torch.testing.assert_close(layer.q.weight[:8], weight[:8] / 2)
    torch.testing.assert_close(layer.q.bias[:8], bias[:8] / 2)
    assert layer.max_logits[0] == 4
    clip.reset()
    assert layer.max_logits[0] == -math.inf


def test_a_step_that_was_not_applied_leaves_nothing_behind():
    layer = MultiHead()
    optimizer = optimizer_of({"attention": layer}, tau=1.0)
    layer.max_logits = torch.full((4,), 50.0)
    optimizer.qk_clip.gather()
    optimizer.qk_clip.reset()  # vetoed: no step()
    weight = layer.q.weight.detach().clone()
    layer.max_logits = torch.full((4,), 0.5)
    optimizer.step()
    assert torch.equal(layer.q.weight, weight)


@pytest.mark.parametrize("settings", [{"tau": 1.0, "observe_only": True}, {"tau": math.inf}])
def test_observing_measures_and_scales_nothing(settings):
    layer = MultiHead()
    optimizer = optimizer_of({"attention": layer}, **settings)
    weight = layer.q.weight.detach().clone()
    layer.max_logits = torch.full((4,), 50.0)
    optimizer.step()
    assert torch.equal(layer.q.weight, weight)
    assert optimizer.qk_clip.max_logits.tolist() == [[50.0] * 4]
    assert optimizer.qk_clip.gamma.tolist() == [[1.0] * 4]


def test_layers_may_differ_in_their_number_of_heads():
    layers = {"first": MultiHead(heads=4), "second": MultiHead(heads=2)}
    optimizer = optimizer_of(layers, tau=1.0)
    layers["first"].max_logits = torch.tensor([2.0, 0.0, 0.0, 0.0])
    layers["second"].max_logits = torch.tensor([0.0, 4.0])
    second = layers["second"].k.weight.detach().clone()
    optimizer.step()
    assert optimizer.qk_clip.max_logits.tolist() == [[2.0, 0, 0, 0], [0, 4.0, -math.inf, -math.inf]]
    assert optimizer.qk_clip.gamma.tolist() == [[0.5, 1, 1, 1], [1, 0.25, 1, 1]]
    torch.testing.assert_close(layers["second"].k.weight[8:], second[8:] / 2)


def test_a_weight_named_twice_is_scaled_by_both():
    class Fused(MultiHead):
        def row_scales(self, gamma_H):
            rows, ones = gamma_H.sqrt().repeat_interleave(8), torch.ones(32)
            yield self.q.weight, torch.cat((rows[:16], ones[:16]))
            yield self.q.weight, torch.cat((ones[:16], rows[16:]))

    layer = Fused()
    optimizer = optimizer_of({"attention": layer}, tau=1.0)
    weight = layer.q.weight.detach().clone()
    layer.max_logits = torch.full((4,), 4.0)
    optimizer.step()
    torch.testing.assert_close(layer.q.weight, weight / 2)


def test_bfloat16_weights_at_or_below_tau_stay_bit_identical():
    layer = MultiHead().to(torch.bfloat16)
    optimizer = optimizer_of({"attention": layer}, tau=1.0)
    weight = layer.q.weight.detach().clone()
    layer.max_logits = torch.tensor([3.0, 1.0, 0.0, -1.0])
    optimizer.step()
    assert torch.equal(layer.q.weight[8:], weight[8:])
    torch.testing.assert_close(layer.q.weight[:8], (weight[:8].float() / 3**0.5).bfloat16(), rtol=0.01, atol=0)


@pytest.mark.parametrize(("start", "stop"), [(0, 35), (3, 4), (3, 5), (3, 11), (5, 10), (0, 5), (7, 35), (12, 29)])
def test_an_interval_of_a_matrix_is_scaled_by_its_rows(start, stop):
    matrix, scales = torch.randn(7, 5), torch.rand(7)
    expected = (matrix * scales[:, None]).flatten()[start:stop]
    interval = matrix.flatten()[start:stop].clone()
    scale_rows_(interval, scales, start=start, columns=5)
    assert torch.equal(interval, expected)


def test_a_layer_without_the_protocol_is_named():
    with pytest.raises(ValueError, match=r"blocks\.0 \(Linear\) cannot be clipped: it lacks max_logits"):
        QKClip([("blocks.0", nn.Linear(2, 2))])


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_tau_must_be_positive(tau):
    with pytest.raises(ValueError, match=f"tau={tau} must be positive"):
        QKClip([], tau=tau)


def test_a_weight_that_the_optimizer_does_not_have_is_refused():
    class View(MultiHead):
        def row_scales(self, gamma_H):
            yield self.q.weight.view(32, 32), gamma_H.repeat_interleave(8)

    class Short(MultiHead):
        def row_scales(self, gamma_H):
            yield self.q.weight, gamma_H

    with pytest.raises(ValueError, match=r"row_scales of attention names a tensor.*not a view"):
        optimizer_of({"attention": View()})
    with pytest.raises(ValueError, match=r"factors of shape \[4\] for attention\.q\.weight"):
        optimizer_of({"attention": Short()})
