"""QK-Clip: the rule, its effect on multi-head, grouped-query and latent attention, and what it must survive."""

import math

import pytest
import torch
import torch.distributed as dist
from muonclip import MuonClip, QKClip
from muonclip.plan import Piece
from muonclip.qk_clip import clip_factors, scale_rows_
from muonclip.sharded import FlatLayout
from torch import nn
from torch.utils.checkpoint import checkpoint


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

    def row_scales(self, gamma_H, *, alpha=0.5):
        q_rows, k_rows = ((gamma_H**share).repeat_interleave(self.head_dim) for share in (alpha, 1 - alpha))
        yield from ((self.q.weight, q_rows), (self.q.bias, q_rows), (self.k.weight, k_rows))


class Grouped(MultiHead):
    """Grouped queries: two heads share a key, which must not be scaled for one of them."""

    def __init__(self, heads: int = 4, head_dim: int = 8, width: int = 32) -> None:
        super().__init__(heads, head_dim, width)
        self.k = nn.Linear(width, heads // 2 * head_dim, bias=False)

    def logits_HTT(self, x_TD):
        q, k = (f(x_TD).unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for f in (self.q, self.k))
        return q @ k.repeat_interleave(2, 0).mT / self.head_dim**0.5

    def row_scales(self, gamma_H, *, alpha=0.5):
        rows = gamma_H.repeat_interleave(self.head_dim)
        yield from ((self.q.weight, rows), (self.q.bias, rows))


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

    def row_scales(self, gamma_H, *, alpha=0.5):
        q_nope, k_nope = ((gamma_H**share)[:, None].expand(-1, self.nope) for share in (alpha, 1 - alpha))
        yield self.q.weight, torch.cat((q_nope, gamma_H[:, None].expand(-1, self.rope)), 1).flatten()
        yield self.kv.weight, torch.cat((k_nope, torch.ones_like(k_nope)), 1).flatten()


def optimizer_of(layers: dict[str, nn.Module], *, lr: float = 0.0, **clip) -> MuonClip:
    named = [(f"{name}.{n}", p) for name, layer in layers.items() for n, p in layer.named_parameters()]
    groups = [{"params": [(n, p) for n, p in named if p.ndim == 2], "algorithm": "muon"}]
    if vectors := [(n, p) for n, p in named if p.ndim == 1]:
        groups.append({"params": vectors, "algorithm": "adamw"})
    return MuonClip(groups, lr=lr, qk_clip=QKClip(list(layers.items()), **clip))


UNSCALED = ("k_rope.weight",)  # by any head


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", [MultiHead, Grouped, Latent])
def test_the_max_of_each_head_becomes_the_smaller_of_itself_and_tau(kind, alpha):
    for seed in range(10):
        torch.manual_seed(seed)
        layer, x = kind(), 3 * torch.randn(16, 32)
        with torch.no_grad():  # heads of very different size
            for weight, rows in layer.row_scales(torch.tensor([0.5, 2.0, 60.0, 300.0]), alpha=0.5):
                weight.mul_(rows.view(-1, *[1] * (weight.ndim - 1)))
        optimizer = optimizer_of({"attention": layer}, tau=20.0, alpha=alpha)
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        largest = layer(x).detach().amax((1, 2))
        clipped = largest > 20
        assert 0 < clipped.sum() < 4  # both kinds of heads are there
        optimizer.step()
        torch.testing.assert_close(layer.logits_HTT(x).amax((1, 2)), largest.clamp(max=20), atol=1e-4, rtol=0)
        torch.testing.assert_close(optimizer.qk_clip.max_logits[0], largest)
        torch.testing.assert_close(optimizer.qk_clip.gamma[0], torch.where(clipped, 20 / largest, 1.0))
        for name, p in layer.named_parameters():  # heads at or below tau: bit for bit
            if name in UNSCALED or (kind is Grouped and name == "k.weight"):
                assert torch.equal(p, before[name])
            else:
                same = (p == before[name]).unflatten(0, (4, -1)).flatten(1).all(1)
                assert same[~clipped].all()
        if kind is Latent:  # values are no part of any logit
            old, new = (w.view(4, 2, 8, 32)[:, 1] for w in (before["kv.weight"], layer.kv.weight))
            assert torch.equal(old, new)


@pytest.mark.parametrize(("alpha", "q", "k"), [(0.0, 1.0, 0.25), (0.5, 0.5, 0.5), (0.75, 0.25**0.75, 0.25**0.25)])
def test_alpha_is_the_share_of_the_query(alpha, q, k):
    layer = MultiHead()
    optimizer = optimizer_of({"attention": layer}, tau=1.0, alpha=alpha)
    q_before, k_before = layer.q.weight.detach().clone(), layer.k.weight.detach().clone()
    layer.max_logits = torch.full((4,), 4.0)
    optimizer.step()
    torch.testing.assert_close(layer.q.weight, q_before * q)
    torch.testing.assert_close(layer.k.weight, k_before * k)


def test_a_module_that_knows_square_roots_alone_is_clipped_at_k2s_alpha():
    layer = MultiHead()
    layer.row_scales = lambda gamma_H, whole=layer.row_scales: whole(gamma_H)
    layer(3 * torch.randn(16, 32))
    clip = QKClip([("attention", layer)], tau=0.1)
    clip.gather()
    assert (clip.gamma < 1).all()
    with pytest.raises(ValueError, match=r"row_scales of attention \(MultiHead\) takes no alpha"):
        QKClip([("attention", layer)], tau=0.1, alpha=0.3)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_must_be_a_share(alpha):
    with pytest.raises(ValueError, match=f"alpha={alpha} must be from 0 to 1"):
        QKClip([], alpha=alpha)


def test_the_clip_changes_no_momentum_and_no_other_weight():
    """Against the same step without it: only rows of heads above tau differ."""
    outcomes = []
    for observe_only in (True, False):
        torch.manual_seed(0)
        layer = MultiHead()
        optimizer = optimizer_of({"attention": layer}, lr=0.01, tau=1.0, observe_only=observe_only)
        layer(torch.randn(16, 32)).square().mean().backward()
        layer.max_logits = torch.tensor([5.0, 1.0, -1.0, 0.0])
        optimizer.step()
        outcomes.append((layer, [values for state in optimizer.state.values() for values in state.values()]))
    (watched, its_state), (clipped, state) = outcomes
    assert all(torch.equal(a, b) for a, b in zip(its_state, state, strict=True))
    for name, p in clipped.named_parameters():
        same = (p == watched.get_parameter(name)).unflatten(0, (4, -1)).flatten(1)
        assert same[1:].all()
        assert not same[0].all()


@pytest.mark.parametrize("cut", [0, 8 * 32, 3 * 32 + 7, 32 * 32])
def test_a_shard_of_heads_at_or_below_tau_stays_bit_identical(cut):
    """Two shards of one matrix, one after the other in one process; the cut may fall into the clipped head."""
    weight = torch.randn(32, 32)
    expected = weight.clone()
    expected[:8] *= torch.tensor(0.25)
    bounds = (0, cut), (cut, 32 * 32)
    for rank, (start, stop) in enumerate(bounds):
        layer = MultiHead()
        layer.row_scales = lambda gamma, *, alpha=0.5, q=layer.q: [(q.weight, gamma.repeat_interleave(8))]
        clip = QKClip([("attention", layer)], tau=1.0)
        group = {"params": [("q", layer.q.weight)], "algorithm": "adamw"}
        optimizer = MuonClip([group], lr=0.0, qk_clip=clip)
        flat = weight.flatten()[start:stop].clone()
        flat.grad = torch.ones_like(flat)
        optimizer.param_groups[0]["params"] = [flat]
        pieces = tuple((Piece("q", (32, 32), *interval, 0),) if interval[1] else () for interval in bounds)
        optimizer.shard({flat: FlatLayout(pieces, rank, None)})
        layer.max_logits = torch.tensor([4.0, 1.0, 0.5, -1.0])
        optimizer.step()
        assert torch.equal(flat, expected.flatten()[start:stop])


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
    assert optimizer.qk_clip.invalid.tolist() == [[True, True, False, False]]
    layer.max_logits = torch.full((4,), 0.5)
    optimizer.step()
    assert not optimizer.qk_clip.invalid.any()


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
    clip = optimizer.qk_clip
    layer.max_logits = torch.full((4,), 50.0)
    clip.gather()
    clip.reset()  # vetoed: no step()
    assert clip.max_logits.tolist() == [[50.0] * 4]  # still told
    assert clip.gamma.tolist() == clip.cumulative.tolist() == [[1.0] * 4]
    weight = layer.q.weight.detach().clone()
    layer.max_logits = torch.full((4,), 0.5)
    optimizer.step()
    assert torch.equal(layer.q.weight, weight)
    assert clip.max_logits.tolist() == [[0.5] * 4]
    assert clip.cumulative.tolist() == [[1.0] * 4]


def test_cumulative_scales_are_the_product_over_applied_steps():
    layers = {"first": MultiHead(heads=4), "second": MultiHead(heads=2)}
    optimizer = optimizer_of(layers, tau=1.0)
    clip, groups = optimizer.qk_clip, optimizer.param_groups
    weight = layers["first"].q.weight.detach().clone()

    def step(*, applied: bool) -> None:
        layers["first"].max_logits = torch.tensor([4.0, 2.0, 1.0, math.nan])
        clip.gather()
        for group in groups if applied else []:  # as ZeRO does; counted once all the same
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups
        clip.reset()

    for applied in (True, False, True):
        step(applied=applied)
    assert clip.cumulative.tolist() == [[1 / 16, 1 / 4, 1, 1], [1, 1, 1, 1]]
    torch.testing.assert_close(layers["first"].q.weight[:8], weight[:8] / 4)
    saved = clip.state_dict()
    assert {name: scales.tolist() for name, scales in saved.items()} == {
        "first": [1 / 16, 1 / 4, 1, 1],
        "second": [1, 1],
    }
    other = optimizer_of(layers, tau=1.0).qk_clip
    other.load_state_dict(saved)
    assert torch.equal(other.cumulative, clip.cumulative)
    step(applied=True)
    assert other.cumulative[0, 0] == 1 / 16  # a copy
    with pytest.raises(ValueError, match=r"layers with heads \{'first': 4, 'second': 2\}, but here are \{'first': 4\}"):
        optimizer_of({"first": layers["first"]}).qk_clip.load_state_dict(saved)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_each_training_micro_batch_counts_once_and_evaluation_does_not(use_reentrant):
    torch.manual_seed(0)
    layer = MultiHead()
    batches = [torch.randn(16, 32, requires_grad=True) * size for size in (1, 3, 2)]
    expected = torch.stack([layer.logits_HTT(x).detach().amax((1, 2)) for x in batches]).amax(0)
    for x in batches:
        out = layer(x) if use_reentrant is None else checkpoint(layer, x, use_reentrant=use_reentrant)
        out.square().mean().backward()
    layer.eval()(100 * batches[0])
    layer.train()
    optimizer = optimizer_of({"attention": layer})
    optimizer.step()
    assert torch.equal(optimizer.qk_clip.max_logits[0], expected)
    optimizer.step()  # the next step knows nothing of it
    assert optimizer.qk_clip.max_logits.tolist() == [[-math.inf] * 4]


def test_one_reduction_for_all_layers_and_heads(monkeypatch):
    layers = {f"layer{n}": MultiHead(heads=2 + 2 * (n % 2)) for n in range(5)}
    clip = optimizer_of(layers, tau=1.0).qk_clip
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda values, op, group: calls.append((tuple(values.shape), op)))
    clip.gather()
    assert calls == [((5, 4), dist.ReduceOp.MAX)]


def test_layers_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two layers have one name: a, a"):
        QKClip([("a", MultiHead()), ("a", MultiHead())])


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
        def row_scales(self, gamma_H, *, alpha=0.5):
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
        def row_scales(self, gamma_H, *, alpha=0.5):
            yield self.q.weight.view(32, 32), gamma_H.repeat_interleave(8)

    class Short(MultiHead):
        def row_scales(self, gamma_H, *, alpha=0.5):
            yield self.q.weight, gamma_H

    with pytest.raises(ValueError, match=r"row_scales of attention names a tensor.*not a view"):
        optimizer_of({"attention": View()})
    with pytest.raises(ValueError, match=r"factors of shape \[4\] for attention\.q\.weight"):
        optimizer_of({"attention": Short()})
