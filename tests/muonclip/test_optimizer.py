"""MuonClip in a plain loop: against torch's own optimizers and plain formulas, its state, and what it refuses."""

import copy
import io
import math

import pytest
import torch
from muonclip import POLAR_EXPRESS, QUINTIC, MuonClip, newton_schulz

BF16 = torch.bfloat16


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def give_gradients(step: int, *parameters: torch.Tensor) -> None:
    for number, p in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * step + number)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def muon(*named: tuple[str, torch.Tensor], **settings) -> MuonClip:
    return MuonClip([{"params": list(named), "algorithm": "muon"}], **{"lr": 0.01, **settings})


@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_muon_within_the_rounding_of_bfloat16(nesterov):
    shapes = [(24, 40), (40, 24), (32, 32), (24, 40), (1, 9), (9, 1), (5, 60), (64, 8), (3, 3)]
    own = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    theirs = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    start = [p.detach().clone() for p in own]
    settings = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov}
    optimizer = muon(*((str(i), p) for i, p in enumerate(own)), newton_schulz_dtype=torch.bfloat16, **settings)
    reference = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(5):
        give_gradients(step, *own)
        give_gradients(step, *theirs)
        optimizer.step()
        reference.step()
    for p, q, s in zip(own, theirs, start, strict=True):
        assert (p - q).norm() <= 0.02 * (q - s).norm()


@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_the_formulas_in_float64(nesterov):
    p = parameter(12, 20)
    optimizer = muon(("p", p), lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov)
    weight, buffer = p.detach().double(), torch.zeros(12, 20, dtype=torch.float64)
    for step in range(5):
        give_gradients(step, p)
        optimizer.step()
        grad = p.grad.double()
        buffer = 0.9 * buffer + grad
        u, s, v = torch.linalg.svd(grad + 0.9 * buffer if nesterov else buffer, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        weight = weight - 0.02 * (0.2 * math.sqrt(20) * (u * s @ v) + 0.1 * weight)
    assert (p.double() - weight).abs().max() <= 1e-6


SPLITS = {
    "fused projections": ((14, 12), (6, 4, 4)),
    "blocks of each head": ((15, 8), (3, 2) * 3),
    "each of a stack": ((2, 10, 6), (4, 6)),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_parameter_is_its_blocks_as_parameters_of_their_own(name):
    shape, rows = SPLITS[name]
    whole, unsplit = parameter(*shape), parameter(*shape)
    blocks = [
        torch.nn.Parameter(block.clone()) for m in whole.detach().reshape(-1, *shape[-2:]) for block in m.split(rows)
    ]
    together = muon(("fused", whole), split={"fused": rows})
    apart, alone = muon(*((str(i), p) for i, p in enumerate(blocks))), muon(("fused", unsplit))
    for step in range(3):
        give_gradients(step, whole, unsplit)
        pieces = [block for m in whole.grad.reshape(-1, *shape[-2:]) for block in m.split(rows)]
        for p, grad in zip(blocks, pieces, strict=True):
            p.grad = grad.clone()
        for optimizer in (together, apart, alone):
            optimizer.step()
    assert (whole.reshape(-1, shape[-1]) - torch.cat(blocks)).abs().max() <= 1e-6
    assert (whole - unsplit).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"p": (3, 4)}, r"split cuts p into \[3, 4\] rows, but it has 8"),
        ({"p": (8, 0)}, "positive numbers"),
        ({"p": ()}, "positive numbers"),
        ({"q": (8,)}, "split names q, which is no parameter"),
        ({"v": (4, 4)}, "split names v, whose algorithm is adamw"),
    ],
)
def test_a_split_that_cannot_be_is_named(split, message):
    groups = [
        {"params": [("p", parameter(8, 6))], "algorithm": "muon"},
        {"params": [("v", parameter(8, 6))], "algorithm": "adamw"},
    ]
    with pytest.raises(ValueError, match=message):
        MuonClip(groups, lr=0.1, split=split)


def test_a_stack_of_experts_is_that_many_matrices():
    stack = parameter(3, 8, 12)
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    together, apart = muon(("experts", stack)), muon(*((str(i), p) for i, p in enumerate(alone)))
    for step in range(3):
        give_gradients(step, stack)
        for p, grad in zip(alone, stack.grad, strict=True):
            p.grad = grad.clone()
        together.step()
        apart.step()
    assert torch.equal(stack, torch.stack(list(alone)))


def test_every_matrix_is_orthogonalised_exactly_once_a_step(monkeypatch):
    shapes = []

    def counting(matrices, **settings):
        shapes.extend([matrices.shape[-2:]] * matrices.shape[:-2].numel())
        return newton_schulz(matrices, **settings)

    monkeypatch.setattr("muonclip.orthogonalize.newton_schulz", counting)
    params = [parameter(8, 12), parameter(12, 8), parameter(3, 8, 12)]
    optimizer = muon(*((str(i), p) for i, p in enumerate(params)), lr=1.0, weight_decay=0.0)
    before = [p.detach().clone() for p in params]
    give_gradients(0, *params)
    optimizer.step()
    assert sorted(shapes) == sorted([(8, 12), (12, 8)] + 3 * [(8, 12)])
    for p, old in zip(params, before, strict=True):
        values = torch.linalg.svdvals((old - p.detach()) / (0.2 * math.sqrt(12)))
        assert 0.6 < values.min() < values.max() < 1.25


def test_adamw_equals_torch():
    own, theirs = [parameter(5, 7), parameter(9, seed=1)], [parameter(5, 7), parameter(9, seed=1)]
    optimizer = MuonClip(
        [
            {"params": [("w", own[0])], "algorithm": "adamw", "weight_decay": 0.1},
            {"params": [("b", own[1])], "algorithm": "adamw", "weight_decay": 0.0, "lr": 0.02},
        ],
        lr=0.01,
    )
    reference = torch.optim.AdamW(
        [
            {"params": [theirs[0]], "weight_decay": 0.1, "lr": 0.01},
            {"params": [theirs[1]], "weight_decay": 0.0, "lr": 0.02},
        ],
        betas=(0.9, 0.95),
    )
    for step in range(5):
        give_gradients(step, *own)
        give_gradients(step, *theirs)
        optimizer.step()
        reference.step()
    for p, q in zip(own, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-6)


def mixed(dtype: torch.dtype = torch.float32, **settings) -> tuple[list[torch.nn.Parameter], MuonClip]:
    matrix, stack, vector = (parameter(*shape, dtype=dtype) for shape in ((6, 4), (2, 4, 6), (5,)))
    groups = [
        {"params": [("matrix", matrix), ("stack", stack)], "algorithm": "muon", "role": "mlp", "peak_lr": 3.0},
        {"params": [("vector", vector)], "algorithm": "adamw"},
    ]
    return [matrix, stack, vector], MuonClip(groups, lr=0.1, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_there_from_the_start_and_in_float32(dtype):
    params, optimizer = mixed(dtype)
    assert [set(optimizer.state[p]) for p in params] == [{"momentum"}, {"momentum"}, {"exp_avg", "exp_avg_sq", "step"}]
    for p in params:
        for key, value in optimizer.state[p].items():
            assert value.dtype == torch.float32
            assert key == "step" or value.shape == p.shape
    kept = optimizer.state[params[0]]["momentum"]
    give_gradients(0, *params)
    optimizer.step()
    assert optimizer.state[params[0]]["momentum"] is kept  # a loader may write into it
    assert optimizer.state[params[2]]["step"] == 1
    assert optimizer.param_groups[0]["role"] == "mlp"
    assert optimizer.param_groups[0]["peak_lr"] == 3.0


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_and_loaded_optimizer_goes_on_bit_for_bit(dtype, momentum_dtype):
    params, optimizer = mixed(dtype, momentum_dtype=momentum_dtype)
    for step in range(2):
        give_gradients(step, *params)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others, second = mixed(dtype, momentum_dtype=momentum_dtype)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.state[others[0]]["momentum"].dtype == momentum_dtype
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    for step in range(2, 4):
        for these, one in ((params, optimizer), (others, second)):
            give_gradients(step, *these)
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_state_of_another_shape_is_refused():
    _, optimizer = mixed()
    saved = optimizer.state_dict()
    saved["state"][0]["momentum"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="no momentum of shape"):
        mixed()[1].load_state_dict(saved)


def test_the_learning_rate_is_read_at_every_step():
    params, optimizer = mixed()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    before = [p.detach().clone() for p in params]
    give_gradients(0, *params)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))  # warm-up began at zero
    scheduler.step()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_missing_gradients_are_skipped_and_zero_gradients_only_decay():
    params, optimizer = mixed()
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), before[0] * (1 - 0.1 * 0.1))
    assert torch.equal(params[1], before[1])
    assert torch.equal(params[2], before[2])
    assert optimizer.state[params[2]]["step"] == 0


def test_parameters_need_not_be_contiguous():
    straight = parameter(6, 4)
    transposed = torch.nn.Parameter(straight.detach().t().contiguous().t())
    assert not transposed.is_contiguous()
    one, two = muon(("p", straight)), muon(("p", transposed))
    for step in range(3):
        give_gradients(step, straight)
        transposed.grad = straight.grad.clone()
        one.step()
        two.step()
    torch.testing.assert_close(transposed, straight, atol=1e-6, rtol=0)


def test_bfloat16_weights_get_the_update_of_float32_rounded_once():
    low, high = parameter(8, 6, dtype=torch.bfloat16), parameter(8, 6, dtype=torch.bfloat16)
    high = torch.nn.Parameter(high.detach().float())
    give_gradients(0, low)
    high.grad = low.grad.float()
    muon(("p", low), weight_decay=0.0).step()
    muon(("p", high), weight_decay=0.0).step()
    assert torch.equal(low, high.bfloat16())


def test_a_group_added_later_is_checked_and_trained_as_the_others():
    params, optimizer = mixed()
    late = parameter(3, 5)
    optimizer.add_param_group({"params": [("late", late)], "algorithm": "muon"})
    assert set(optimizer.state[late]) == {"momentum"}
    with pytest.raises(ValueError, match="matrix and again are one tensor"):
        optimizer.add_param_group({"params": [("again", params[0])], "algorithm": "muon"})
    with pytest.raises(ValueError, match="two parameters are named late"):
        optimizer.add_param_group({"params": [("late", parameter(3, 5))], "algorithm": "muon"})


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": [("v", parameter(4))]}, r"v has shape \[4\].*algorithm='adamw'"),
        ({"params": [("conv", parameter(2, 2, 3, 3))]}, "conv has shape"),
        ({"params": [("c", torch.zeros(2, 2, dtype=torch.complex64))]}, r"c is torch\.complex64"),
        ({"params": [("i", torch.zeros(2, 2, dtype=torch.int64))]}, r"i is torch\.int64"),
        ({"params": [parameter(2, 2)]}, "pairs"),
        ({"params": []}, "no parameters"),
        (
            {"params": [("p", parameter(2, 2))], "algorithm": "sgd"},
            "'sgd' in the group of p must be one of muon, adamw",
        ),
        ({"params": [("p", parameter(2, 2))], "lr": -1.0}, "lr=-1.0 in the group of p"),
        ({"params": [("p", parameter(2, 2))], "lr": math.nan}, "lr=nan in the group of p"),
        ({"params": [("p", parameter(2, 2))], "betas": (0.9, 1.0)}, r"betas\[1\]=1.0"),
        (
            {"params": [("p", parameter(2, 2))], "newton_schulz_coefficients": ()},
            r"newton_schulz_coefficients=\(\) in the group of p must be three numbers",
        ),
        ({"params": [("p", parameter(2, 2))], "newton_schulz_coefficients": ((1.0, 2.0),)}, "three numbers"),
        ({"params": [("p", parameter(2, 2))], "newton_schulz_coefficients": ((1.0, 2.0, math.nan),)}, "three numbers"),
        (
            {"params": [("p", parameter(2, 2))], "newton_schulz_dtype": torch.float16},
            r"newton_schulz_dtype=torch\.float16",
        ),
        ({"params": [("p", parameter(2, 2))], "momentum_dtype": torch.float16}, r"momentum_dtype=torch\.float16"),
        ({"params": [("p", parameter(2, 2))], "exchange_dtype": torch.float16}, r"exchange_dtype=torch\.float16"),
        (
            {"params": [("p", parameter(2, 2))], "exchange_buffer_bytes": 0},
            "exchange_buffer_bytes=0 in",
        ),
    ],
)
def test_what_cannot_be_optimised_is_named(group, message):
    with pytest.raises(ValueError, match=message):
        MuonClip([{"algorithm": "muon", **group}], lr=0.1)


def test_a_group_must_say_its_algorithm():
    with pytest.raises(ValueError, match="algorithm=None in the group of p"):
        MuonClip([{"params": [("p", parameter(2, 2))]}], lr=0.1)


def test_a_sparse_gradient_is_named():
    p = parameter(4, 3)
    optimizer = MuonClip([{"params": [("embed", p)], "algorithm": "adamw"}], lr=0.1)
    p.grad = torch.zeros(4, 3).to_sparse()
    with pytest.raises(ValueError, match="gradient of embed is sparse"):
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (8, 64)])
def test_one_step_equals_torch_muon_within_the_rounding_of_bfloat16(shape, nesterov):
    own, theirs = parameter(*shape), parameter(*shape)
    settings = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov}
    optimizer = muon(("p", own), newton_schulz_dtype=torch.bfloat16, **settings)
    reference = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    before = own.detach().clone()
    give_gradients(0, own)
    theirs.grad = own.grad.clone()
    optimizer.step()
    reference.step()
    assert (own - theirs).norm() <= 2**-6 * (own - before).norm()


def test_torch_muon_shrinks_what_has_a_tiny_norm_and_this_does_not():
    own, theirs = torch.nn.Parameter(torch.zeros(8, 12)), torch.nn.Parameter(torch.zeros(8, 12))
    give_gradients(0, own)
    own.grad *= 1e-10
    theirs.grad = own.grad.clone()
    muon(("p", own)).step()
    torch.optim.Muon([theirs], lr=0.01, adjust_lr_fn="match_rms_adamw").step()
    rms = [p.square().mean().sqrt().item() / 0.01 for p in (own, theirs)]
    assert 0.15 < rms[0] < 0.25
    assert rms[1] < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_bfloat16_momentum_takes_half_the_memory_and_changes_little(dtype):
    high, low = parameter(16, 24, dtype=dtype), parameter(16, 24, dtype=dtype)
    start = high.detach().clone()
    exact, rounded = muon(("p", high)), muon(("p", low), momentum_dtype=torch.bfloat16)
    assert rounded.state[low]["momentum"].dtype == torch.bfloat16
    for step in range(5):
        give_gradients(step, high, low)
        low.grad = high.grad.clone()
        exact.step()
        rounded.step()
    assert not torch.equal(high, low)
    assert (high - low).norm() <= 0.02 * (high - start).norm()


def test_the_settings_of_a_group_reach_newton_schulz(monkeypatch):
    seen = []

    def recording(matrices, **settings):
        seen.append((tuple(matrices.shape), settings))
        return newton_schulz(matrices, **settings)

    monkeypatch.setattr("muonclip.orthogonalize.newton_schulz", recording)
    own, general = parameter(8, 32), parameter(6, 4)
    special = {"newton_schulz_coefficients": POLAR_EXPRESS, "newton_schulz_gram": True, "newton_schulz_dtype": BF16}
    groups = [{"params": [("own", own)], **special}, {"params": [("general", general)]}]
    optimizer = MuonClip([{**group, "algorithm": "muon"} for group in groups], lr=0.1)
    give_gradients(0, own, general)
    optimizer.step()
    assert seen == [
        ((1, 8, 32), {"coefficients": POLAR_EXPRESS, "dtype": BF16, "gram": True}),
        ((1, 6, 4), {"coefficients": QUINTIC, "dtype": torch.float32, "gram": False}),
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=4, cycle_momentum=False
        ),
    ],
)
def test_schedulers_of_torch_set_the_learning_rate(make):
    params, optimizer = mixed()
    scheduler = make(optimizer)
    for step in range(3):
        before = [p.detach().clone() for p in params]
        rate = optimizer.param_groups[0]["lr"]
        give_gradients(step, *params)
        optimizer.step()
        # The root mean square of an orthogonal update; decay adds little.
        update = (params[0] - before[0] * (1 - 0.1 * rate)).square().mean().sqrt().item()
        assert 0.1 * rate < update < 0.3 * rate
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] != rate


def test_a_thousand_small_matrices_equal_each_one_alone():
    many = [parameter(6, 4 + i % 3, seed=i) for i in range(1000)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in many[::200]]
    optimizer = muon(*((str(i), p) for i, p in enumerate(many)))
    singles = [muon(("p", p)) for p in alone]
    for step in range(2):
        give_gradients(step, *many)
        for p, q in zip(alone, many[::200], strict=True):
            p.grad = q.grad.clone()
        for one in (optimizer, *singles):
            one.step()
    for p, q in zip(alone, many[::200], strict=True):
        assert (p - q).abs().max() <= 1e-6


def test_a_copied_state_dict_is_independent_and_loads():
    params, optimizer = mixed()
    give_gradients(0, *params)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    momentum = saved["state"][0]["momentum"].clone()
    optimizer.step()
    assert torch.equal(saved["state"][0]["momentum"], momentum)
    others, second = mixed()
    second.load_state_dict(saved)
    assert torch.equal(second.state[others[0]]["momentum"], momentum)


def test_closures_are_refused():
    with pytest.raises(ValueError, match="no closure"):
        muon(("p", parameter(2, 2))).step(lambda: 0.0)


def test_parameters_replaced_behind_its_back_are_noticed():
    optimizer = muon(("p", parameter(2, 2)))
    flat = torch.zeros(4)
    flat.grad = torch.zeros(4)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"shape \[4\] has no state.*call shard\(\)"):
        optimizer.step()
