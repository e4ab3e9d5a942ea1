"""Shards: the same weights as one process, however parameters are cut, and each matrix orthogonalised once in all."""

import dataclasses
import math
from itertools import accumulate, pairwise

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from muonclip import FlatLayout, MuonClip, Piece, QKClip, newton_schulz
from muonclip.audit import exchanges
from muonclip.optimizer import muon_updates
from muonclip.ownership import newton_schulz_cost

# In flat order; the boundaries of CUTS fall into them.
MATRICES = {"a": (6, 10), "b": (7, 3), "experts": (3, 4, 6), "q": (8, 6)}  # 60, 21, 72 and 48 elements
REST = {"embedding": (11, 5), "q_bias": (8,)}
COUNT = 6  # matrices, each expert one
SPLIT = {"a": (2, 4), "experts": (1, 3), "q": (4, 4)}  # rows; a cut between two ranks falls into an expert's second

# Where each rank's shard begins and ends; what goes past 201 and 63 elements is padding.
CUTS = {
    "even, as ZeRO cuts": {"muon": (0, 67, 134, 201), "adamw": (0, 21, 42, 63)},
    "padded": {"muon": (0, 80, 160, 240), "adamw": (0, 30, 60, 90)},
    "one matrix over all ranks": {"muon": (0, 20, 40, 201), "adamw": (0, 1, 2, 63)},
    "inside a row, and inside one expert": {"muon": (0, 83, 86, 201), "adamw": (0, 57, 61, 63)},
    "a rank that holds nothing": {"muon": (0, 0, 170, 201), "adamw": (0, 63, 63, 63)},
    "nothing straddles": {"muon": (0, 60, 81, 201), "adamw": (0, 20, 40, 63)},
}
STEPS = 3


class Attention:
    """Two heads of four query rows and a bias each."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight, self.bias, self.max_logits = weight, bias, torch.full((2,), -math.inf)

    def reset_max_logits(self) -> None:
        self.max_logits = torch.full((2,), -math.inf)

    def row_scales(self, gamma_H, *, alpha=0.5):
        rows = gamma_H.repeat_interleave(4)
        yield from ((self.weight, rows), (self.bias, rows))


def build(nesterov: bool = True, **settings) -> tuple[dict[str, torch.nn.Parameter], Attention, MuonClip]:
    generator = torch.Generator().manual_seed(0)
    params = {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in (MATRICES | REST).items()}
    attention = Attention(params["q"], params["q_bias"])
    groups = [
        {"params": [(n, params[n]) for n in names], "algorithm": algorithm}
        for names, algorithm in ((MATRICES, "muon"), (REST, "adamw"))
    ]
    clip = QKClip([("attention", attention)], tau=1.0)
    return params, attention, MuonClip(groups, lr=0.02, nesterov=nesterov, qk_clip=clip, **settings)


def pieces(names: dict[str, tuple[int, ...]], low: int, high: int) -> tuple[Piece, ...]:
    """What of the parameters, one after the other, lies in [low, high)."""
    sizes = [math.prod(shape) for shape in names.values()]
    found = []
    for (name, shape), size, offset in zip(names.items(), sizes, accumulate(sizes, initial=0), strict=False):
        start, stop = max(low, offset), min(high, offset + size)
        if start < stop:
            found.append(Piece(name, shape, start - offset, stop - offset, start - low))
    return tuple(found)


def layout(names, cuts, rank: int, group=None) -> FlatLayout:
    return FlatLayout(tuple(pieces(names, low, high) for low, high in pairwise(cuts)), rank, group)


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return {n: torch.randn(s, generator=generator) for n, s in (MATRICES | REST).items()}


def cut(names, values: dict[str, torch.Tensor], low: int, high: int) -> torch.Tensor:
    flat = torch.cat([values[n].detach().flatten() for n in names])
    return torch.nn.functional.pad(flat, (0, max(0, high - len(flat))))[low:high].clone()


def run_plain(nesterov: bool) -> dict[str, torch.Tensor]:
    params, attention, optimizer = build(nesterov)
    for step in range(STEPS):
        for name, grad in gradients(step).items():
            params[name].grad = grad
        attention.max_logits = torch.tensor([0.5, 2.0 + step])
        optimizer.step()
    return params


def run_sharded(
    cuts, rank: int, group, *, nesterov: bool = True, grouped: bool = True, **settings
) -> tuple[MuonClip, list]:
    """The steps on shards, cut to a group at a time as ZeRO does, or for all at once."""
    params, attention, optimizer = build(nesterov, **settings)
    bounds = [(cuts[key][rank], cuts[key][rank + 1]) for key in ("muon", "adamw")]
    flats = [cut(names, params, *b) for names, b in zip((MATRICES, REST), bounds, strict=True)]
    for param_group, flat in zip(optimizer.param_groups, flats, strict=True):
        param_group["params"] = [flat]
    layouts = (layout(MATRICES, cuts["muon"], rank, group), layout(REST, cuts["adamw"], rank, group))
    optimizer.shard(dict(zip(flats, layouts, strict=True)))
    assert [set(optimizer.state[f]) for f in flats] == [{"momentum"}, {"exp_avg", "exp_avg_sq", "step"}]
    everything = optimizer.param_groups
    for step in range(STEPS):
        grads = gradients(step)
        for names, flat, b in zip((MATRICES, REST), flats, bounds, strict=True):
            flat.grad = cut(names, grads, *b)
        # One rank saw the largest logit of the second head: all must clip by it.
        attention.max_logits = torch.tensor([0.5, 2.0 + step if rank == 0 else -1.0])
        if grouped:
            optimizer.qk_clip.gather()
            for param_group in everything:
                optimizer.param_groups = [param_group]
                optimizer.step()
            optimizer.param_groups = everything
            optimizer.qk_clip.reset()
        else:
            optimizer.step()
    return optimizer, list(zip(flats, layouts, strict=True))


def check_equal(expected: dict[str, torch.Tensor], shards: list) -> None:
    for flat, its_layout in shards:
        for piece in its_layout.pieces_by_rank[its_layout.rank]:
            found = flat[piece.offset : piece.offset + piece.stop - piece.start]
            difference = found - expected[piece.name].detach().flatten()[piece.start : piece.stop]
            assert difference.abs().max() <= 1e-6, piece.name


def counting(calls: list[int]):
    def count(matrices, **settings):
        calls.append(matrices.shape[:-2].numel())
        return newton_schulz(matrices, **settings)

    return count


def of_three(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []
        patch.setattr("muonclip.orthogonalize.newton_schulz", counting(calls))
        for number, cuts in enumerate(CUTS.values()):
            for nesterov in (True, False):
                expected = run_plain(nesterov)
                calls.clear()
                _, shards = run_sharded(cuts, rank, None, nesterov=nesterov, grouped=number % 2 == 0)
                check_equal(expected, shards)
                total = torch.tensor(sum(calls))
                dist.all_reduce(total)
                assert total == COUNT * STEPS
    for name in ("even, as ZeRO cuts", "one matrix over all ranks", "a rank that holds nothing"):
        check_rounds(CUTS[name], rank)
        check_bfloat16(CUTS[name], rank)
    # Two ranks of the three, as expert-data groups are: the third takes no part.
    pair = dist.new_group([0, 2])
    if rank != 1:
        clip_alone = dataclasses.replace(layout(MATRICES, (0, 100, 201), rank // 2), group=pair)
        assert dist.get_rank(pair) == clip_alone.rank
        for settings in ({}, {"split": SPLIT, "newton_schulz_gram": True}):
            check_equal(run_plain_on(pair, **settings), run_pair(clip_alone, **settings))
    check_groups_of_different_ranks(rank, pair)
    # A NaN on one rank is the same news to all.
    _, attention, optimizer = build()
    attention.max_logits = torch.tensor([math.nan if rank == 1 else 0.0, 3.0 * rank])
    optimizer.qk_clip.gather()
    assert optimizer.qk_clip.max_logits.tolist() == [[math.inf, 6.0]]
    torch.testing.assert_close(optimizer.qk_clip.gamma, torch.tensor([[1.0, 1 / 6]]))
    dist.destroy_process_group()


def check_rounds(cuts, rank: int) -> None:
    """Rounds of one matrix give the bits of one round for all, and hold no more than they may."""
    everything, at_once = run_sharded(cuts, rank, None)
    with pytest.MonkeyPatch.context() as patch:
        seen, under_way = watch_transfers(patch)
        beside: list[int] = []  # transfers under way at each call of Newton-Schulz

        def watching(directions, group):
            beside.append(len(under_way))
            return muon_updates(directions, group)

        patch.setattr("muonclip.optimizer.muon_updates", watching)
        optimizer, by_rounds = run_sharded(cuts, rank, None, exchange_buffer_bytes=1)
    for (flat, _), (other, _) in zip(by_rounds, at_once, strict=True):
        assert torch.equal(flat, other)
    (one,), (many,) = exchanges(everything), exchanges(optimizer)
    assert one.rounds == any(m.travels for m in one.matrices) <= many.rounds
    assert one.matrices == many.matrices
    assert seen[0] <= many.traffic[rank].buffers <= one.traffic[rank].buffers * 2
    assert seen[1] == STEPS * (many.traffic[rank].sent + many.traffic[rank].received)
    # The first round arrives beside what lies here; then the next one does, and the last one's results leave.
    assert beside == STEPS * [1, *((k + 1 < many.rounds) + (k > 0) for k in range(many.rounds))]


class Watched:
    """A transfer that counts as under way until it is waited for."""

    def __init__(self, handle, nbytes: int, under_way: list[int]) -> None:
        self.handle, self.nbytes, self.under_way = handle, nbytes, under_way

    def wait(self) -> None:
        self.handle.wait()
        self.under_way.remove(self.nbytes)


def watch_transfers(patch) -> tuple[list[int], list[int]]:
    """The most bytes that were under way at a time on this rank and all that it sent and got; and those of each now."""
    real, under_way, seen = dist.all_to_all_single, [], [0, 0]

    def watching(received, sent, *args, **settings):
        under_way.append(sent.nbytes + received.nbytes)
        seen[0] = max(seen[0], sum(under_way))
        seen[1] += under_way[-1]
        return Watched(real(received, sent, *args, **settings), under_way[-1], under_way)

    patch.setattr(dist, "all_to_all_single", watching)
    return seen, under_way


def check_bfloat16(cuts, rank: int) -> None:
    """Half the bytes, for weights that differ, where a matrix travels, by no more than a twentieth of the updates."""
    plain, exact = run_sharded(cuts, rank, None)
    with pytest.MonkeyPatch.context() as patch:
        seen, _ = watch_transfers(patch)
        optimizer, rounded = run_sharded(cuts, rank, None, exchange_dtype=torch.bfloat16)
    (found,) = exchanges(optimizer)
    assert seen[1] == STEPS * (found.traffic[rank].sent + found.traffic[rank].received)
    assert found.traffic[rank].sent * 2 == exchanges(plain)[0].traffic[rank].sent
    travelling = [part for m in found.matrices if m.travels for part in m.parts]
    differs = (exact[0][0] - rounded[0][0]).abs()
    assert (differs <= STEPS * 0.02 * 0.05).all()
    assert bool(differs.any()) == any(part.rank == rank for part in travelling)
    assert torch.equal(exact[1][0], rounded[1][0])


def only_muon(**settings) -> tuple[dict[str, torch.nn.Parameter], MuonClip]:
    params, _, _ = build()
    return params, MuonClip([{"params": [(n, params[n]) for n in MATRICES], "algorithm": "muon"}], lr=0.02, **settings)


def check_groups_of_different_ranks(rank: int, pair) -> None:
    """Dense matrices over all ranks, experts over two of them and over the third alone: planned together."""
    alone = dist.new_group([1])
    dense, experts = ({n: s for n, s in MATRICES.items() if (n == "experts") == here} for here in (False, True))
    params, _, _ = build()
    groups = [{"params": [(n, params[n]) for n in names], "algorithm": "muon"} for names in (experts, dense)]
    optimizer = MuonClip(groups, lr=0.02)
    expert_cuts, group = ((0, 72), alone) if rank == 1 else ((0, 20, 72), pair)
    layouts = (
        layout(experts, expert_cuts, dist.get_rank(group), group),
        layout(dense, (0, 43, 86, 129), rank),
    )
    flats = []
    for names, its_layout, cuts, param_group in zip(
        (experts, dense), layouts, (expert_cuts, (0, 43, 86, 129)), optimizer.param_groups, strict=True
    ):
        flat = cut(names, params, *cuts[its_layout.rank : its_layout.rank + 2])
        flat.grad = cut(names, gradients(0), *cuts[its_layout.rank : its_layout.rank + 2])
        param_group["params"] = [flat]
        flats.append(flat)
    optimizer.shard(dict(zip(flats, layouts, strict=True)))
    optimizer.step()
    check_equal(run_plain_on(None), list(zip(flats, layouts, strict=True)))
    of_experts, of_dense = exchanges(optimizer)
    plans = [None] * 3
    dist.all_gather_object(plans, [(m.name, m.owner) for m in of_dense.matrices])
    assert plans[0] == plans[1] == plans[2]
    # The pair has the load of the dense matrices in mind when it shares out its three experts.
    members = [1] if rank == 1 else [0, 2]
    total = [of_dense.costs[r] + cost for r, cost in zip(members, of_experts.costs, strict=True)]
    assert max(total) - min(total) <= max(newton_schulz_cost(4, 6), 0.01 * max(total))


def run_plain_on(group, **settings) -> dict[str, torch.Tensor]:
    params, optimizer = only_muon(**settings)
    for name, grad in gradients(0).items():
        params[name].grad = grad
    optimizer.step()
    return params


def run_pair(its_layout: FlatLayout, **settings) -> list:
    params, optimizer = only_muon(**settings)
    low, high = ((0, 100), (100, 201))[its_layout.rank]
    flat = cut(MATRICES, params, low, high)
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.shard({flat: its_layout})
    flat.grad = cut(MATRICES, gradients(0), low, high)
    optimizer.step()
    return [(flat, its_layout)]


def test_three_processes_give_the_weights_of_one(tmp_path):
    mp.spawn(of_three, args=(str(tmp_path / "store"),), nprocs=3)


def test_each_block_of_a_split_parameter_is_orthogonalised_once(monkeypatch):
    calls: list[tuple[int, ...]] = []

    def count(matrices, **settings):
        calls.extend([tuple(matrices.shape[-2:])] * matrices.shape[:-2].numel())
        return newton_schulz(matrices, **settings)

    params, plain = only_muon(split=SPLIT)
    for name, grad in gradients(0).items():
        params[name].grad = grad
    plain.step()
    monkeypatch.setattr("muonclip.orthogonalize.newton_schulz", count)
    others, optimizer = only_muon(split=SPLIT)
    flat = cut(MATRICES, others, 0, 201)
    flat.grad = cut(MATRICES, gradients(0), 0, 201)
    optimizer.param_groups[0]["params"] = [flat]
    whole = layout(MATRICES, (0, 201), 0)
    optimizer.shard({flat: whole})
    optimizer.step()
    check_equal(params, [(flat, whole)])
    held = list(whole.pieces_by_rank[0])
    held[0] = dataclasses.replace(held[0], stop=59)
    with pytest.raises(ValueError, match=r"matrix 1 of a must cover its .* elements once, but the layout says: rank 0"):
        optimizer.shard({flat: dataclasses.replace(whole, pieces_by_rank=(tuple(held),))})
    blocks = [(2, 10), (4, 10), (7, 3), (4, 6), (4, 6), *[(1, 6), (3, 6)] * 3]
    assert sorted(calls) == sorted(blocks)


def test_a_matrix_may_lie_in_two_pieces_on_its_rank():
    """With padding between them; the elements need not even be in order."""
    plain, alone = only_muon()
    for name, grad in gradients(0).items():
        plain[name].grad = grad
    alone.step()
    params, optimizer = only_muon()
    whole = layout(MATRICES, (0, 201), 0)
    (held,) = whole.pieces_by_rank
    first = held[0]  # of a, 60 elements; its second half goes to the end
    halves = dataclasses.replace(first, stop=30), dataclasses.replace(first, start=30, offset=205)
    flat, grad = (F.pad(cut(MATRICES, values, 0, 201), (0, 34)) for values in (params, gradients(0)))
    for values in (flat, grad):
        values[205:235] = values[30:60]
    flat.grad = grad
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.shard({flat: dataclasses.replace(whole, pieces_by_rank=((*halves, *held[1:]),))})
    optimizer.step()
    found = torch.cat((flat[:30], flat[205:235]))
    torch.testing.assert_close(found, plain["a"].detach().flatten(), atol=0, rtol=1e-6)


@pytest.mark.parametrize("grouped", [True, False])
def test_one_process_is_the_trivial_layout(grouped):
    _, shards = run_sharded({"muon": (0, 210), "adamw": (0, 63)}, 0, None, grouped=grouped)
    check_equal(run_plain(True), shards)
    assert shards[0][0][201:].abs().max() == 0  # padding stays what it was


def flattened() -> tuple[MuonClip, list[torch.Tensor], list[FlatLayout]]:
    optimizer, shards = run_sharded({"muon": (0, 201), "adamw": (0, 63)}, 0, None)
    return optimizer, [flat for flat, _ in shards], [its_layout for _, its_layout in shards]


def replaced(its_layout: FlatLayout, number: int, **changes) -> FlatLayout:
    held = list(its_layout.pieces_by_rank[0])
    held[number : number + 1] = [dataclasses.replace(held[number], **changes)] if changes else []
    return dataclasses.replace(its_layout, pieces_by_rank=(tuple(held),))


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (0, {}, "a is in no layout: it would never be trained"),
        (0, {"name": "z"}, "gives z the shape .* but it is no parameter of this optimizer"),
        (0, {"shape": (10, 6)}, r"gives a the shape \(10, 6\), but it is \(6, 10\)"),
        (0, {"stop": 59}, "pieces of matrix 0 of a must cover its 60 elements once"),
        (2, {"start": 1}, "pieces of matrix 0 of experts must cover its 24 elements once"),
        (3, {"offset": 160}, "past the end of a shard of 201 elements"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(number, changes, message):
    optimizer, flats, layouts = flattened()
    with pytest.raises(ValueError, match=message):
        optimizer.shard({flats[0]: replaced(layouts[0], number, **changes), flats[1]: layouts[1]})


def test_every_group_needs_a_layout():
    optimizer, flats, layouts = flattened()
    with pytest.raises(ValueError, match=r"group 1 has tensors of shapes .* without one: put its shards"):
        optimizer.shard({flats[0]: layouts[0]})
    optimizer, flats, layouts = flattened()
    optimizer.param_groups[1]["params"] = [torch.zeros(63)]  # replaced again, after shard()
    with pytest.raises(ValueError, match="has no state"):
        optimizer.step()


def test_a_group_of_several_shards_that_are_stepped_one_by_one():
    """As ZeRO-3 does: between steps ``params`` are empty, and each shard is put in for its own update."""
    expected, (params, optimizer) = run_plain_on(None), only_muon()
    parts = [{name: MATRICES[name] for name in names} for names in (list(MATRICES)[:2], list(MATRICES)[2:])]
    group, layouts = optimizer.param_groups[0], {}
    for names in parts:
        size = sum(math.prod(shape) for shape in names.values())
        layouts[cut(names, params, 0, size)] = layout(names, (0, size), 0)
    group["params"] = list(layouts)
    optimizer.shard(layouts)
    group["params"] = []
    for flat, (tensor, its_group) in zip(layouts, optimizer.tensors(), strict=True):
        assert tensor is flat
        assert its_group is group
    for flat, names in zip(layouts, parts, strict=True):
        flat.grad = cut(names, gradients(0), 0, len(flat))
        group["params"] = [flat]
        optimizer.step()
        group["params"] = []
    check_equal(expected, list(layouts.items()))


def test_steps_of_single_groups_need_gathered_logits():
    optimizer, _, _ = flattened()
    optimizer.param_groups = optimizer.param_groups[:1]
    with pytest.raises(ValueError, match=r"call qk_clip\.gather\(\) before"):
        optimizer.step()


def test_state_written_in_place_is_what_the_next_step_uses():
    one, flats, _ = flattened()
    other, others, _ = flattened()
    for flat in others:
        for values in other.state[flat].values():
            values.zero_()
    for flat, copy in zip(flats, others, strict=True):
        for key, values in one.state[flat].items():
            other.state[copy][key].copy_(values)
    for optimizer in (one, other):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(flats, others, strict=True))
