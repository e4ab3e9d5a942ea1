"""Every matrix is orthogonalised exactly once, by MuonClip and never by DeepSpeed's own Muon, or the run is refused."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from muonclip import newton_schulz

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.comm import close_world, open_world
from k2train.config import RunConfig, parse
from k2train.model import build_model
from k2train.train import zero
from k2train.train.audit import OnceEach, foreign_muon, not_once
from k2train.train.engine import (
    PRECISIONS,
    build_clip,
    build_engine,
    build_optimizer,
    deepspeed_config,
    start_deepspeed,
)
from k2train.train.errors import RunError
from k2train.train.experts import DeepSpeedMoE, expert_groups, group_name, mark_experts
from k2train.train.state import Experts

TINY = ("model=nano", "model.vocab_size=64", "model.num_hidden_layers=2", "train.global_batch_size=2")
TINY += ("train.micro_batch_size=2", "train.sequence_length=8")
ALONE = Experts(0, 1)


def config_of(*overrides: str) -> RunConfig:
    return parse(RunConfig, compose(TRAIN, [*TINY, *overrides]))


def build(config: RunConfig, *, wrap=None):
    """The parts of a run; ``wrap`` changes the optimizer's groups before DeepSpeed sees them."""
    model = build_model(config.model, seed=0, dtype=PRECISIONS[config.train.precision], moe_class=DeepSpeedMoE)
    mark_experts(model, expert_groups(open_world("cpu"), size=1))
    optimizer = build_optimizer(
        config.optim, model, build_clip(config.optim, model), expert_group=group_name(1), device=torch.device("cpu")
    )
    if wrap:
        wrap(model, optimizer)
    engine = build_engine(config, model, optimizer, world=open_world("cpu"), precision=config.train.precision)
    held = zero.shards(engine.optimizer, {p: n for n, p in model.named_parameters()})
    zero.hand_over(engine.optimizer, optimizer, held)
    return engine, optimizer, model


def step(engine, optimizer) -> None:
    tokens = torch.arange(16).view(2, 8)
    loss, balance = engine(tokens, tokens)
    engine.backward(loss.mean() + balance)
    optimizer.qk_clip.gather()
    engine.step()
    optimizer.qk_clip.reset()
    assert engine.was_step_applied()


def matrices(model) -> int:
    roles = model.parameter_roles()
    muon = [p for n, p in model.named_parameters() if roles[n] in ("attention", "mlp", "expert", "router")]
    return sum(shape[0] if len(shape) == 3 else 1 for shape in map(zero.whole_shape, muon))


def under_deepspeed(_: int) -> None:
    from deepspeed.runtime.zero.muon import original_muon

    from k2train.train.quiet import import_deepspeed

    torch.set_num_threads(1)
    import_deepspeed("cpu")
    start_deepspeed(open_world("cpu"))
    ours, theirs = [], []

    def count(matrices, **settings):
        ours.append(matrices.shape[:-2].numel())
        return newton_schulz(matrices, **settings)

    def count_theirs(grad, *args, **kwargs):
        theirs.append(tuple(grad.shape))
        return grad

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("muonclip.orthogonalize.newton_schulz", count)
        patch.setattr(original_muon, "muon_update", count_theirs)
        kinds = set()
        for precision in ("fp32", "bf16"):
            for stage in (3, 1, 2):
                engine, optimizer, model = build(
                    config_of(f"train.precision={precision}", f"parallel.zero_stage={stage}")
                )
                kinds.add((type(engine.optimizer).__name__, stage))
                proof = OnceEach(engine, optimizer, model, ALONE)
                ours.clear()
                step(engine, optimizer)
                proof.check(applied=True)
                assert sum(ours) == matrices(model)
                assert theirs == []
                assert all(moe.gate.e_score_correction_bias.dtype == torch.float32 for _, moe in model.moe_layers())
                assert optimizer.orthogonalized is None  # counts no more
        names = {"DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3"}
        assert {name for name, _ in kinds} == names
        # Switched on by an attribute that something sets in between: DeepSpeed does run its own then.
        proof = OnceEach(engine, optimizer, model, ALONE)
        first = next(p for n, p in model.named_parameters() if n == "layers.0.self_attn.q_a_proj.weight")
        first.use_muon = True
        step(engine, optimizer)
        assert tuple(first.shape) in theirs
        with pytest.raises(RunError, match=r"use_muon is set on layers\.0\.self_attn\.q_a_proj\.weight"):
            proof.check(applied=True)

        # A group of matrices that ends up with AdamW, as nothing else would notice.
        def as_adamw(model, optimizer):
            for group in optimizer.param_groups:
                if group["role"] == "router":
                    group["algorithm"] = "adamw"

        engine, optimizer, model = build(config_of("train.precision=fp32"), wrap=as_adamw)
        proof = OnceEach(engine, optimizer, model, ALONE)
        step(engine, optimizer)
        with pytest.raises(RunError, match=r": layers\.1\.mlp\.gate\.weight orthogonalised 0 times, not once$"):
            proof.check(applied=True)

        # A parameter that is in no group.
        def without(model, optimizer):
            group = next(g for g in optimizer.param_groups if g["role"] == "mlp")
            group["params"] = group["params"][1:]

        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj\.weight is in no layout"):
            build(config_of("train.precision=fp32"), wrap=without)
    close_world()


def test_under_deepspeed_each_matrix_is_orthogonalised_exactly_once():
    mp.spawn(under_deepspeed, nprocs=1)


@pytest.fixture
def parts():
    """A model and a stand-in for its optimizer, with the counts of a right step."""
    open_world("cpu")
    config = config_of()
    model = build_model(config.model, seed=0, device="cpu")
    optimizer = build_optimizer(
        config.optim, model, build_clip(config.optim, model), expert_group="ep_size_1", device=torch.device("cpu")
    )
    roles = model.parameter_roles()
    counts = Counter(
        (name, number)
        for name, p in model.named_parameters()
        if roles[name] not in ("embedding", "head", "norm")
        for number in range(len(p) if p.ndim == 3 else 1)
    )
    yield model, optimizer, counts
    close_world()


def test_what_was_not_done_once_is_named(parts):
    model, optimizer, counts = parts
    assert not_once(counts, optimizer, model, ALONE) == []
    counts["layers.1.mlp.experts.w2", 5] += 1
    del counts["layers.0.self_attn.o_proj.weight", 0]
    counts["lm_head.weight", 0] += 1
    assert not_once(counts, optimizer, model, ALONE) == [
        "layers.0.self_attn.o_proj.weight orthogonalised 0 times, not once",
        "layers.1.mlp.experts.w2[5] orthogonalised 2 times, not once",
        "lm_head.weight orthogonalised, whose role is none of attention, mlp, expert, router",
    ]
    counts.clear()
    (sentence,) = not_once(counts, optimizer, model, ALONE)[:1]
    assert f"and {matrices(model) - 3} more orthogonalised 0 times" in sentence  # three are named


def test_ranks_that_share_out_experts_add_up(parts, monkeypatch):
    model, optimizer, counts = parts
    own = counts.copy()
    for name, number in counts:  # of dense matrices the other rank did half
        if "experts.w" not in name and len(name) % 2:
            del own[name, number]

    def other_rank(values):
        theirs = not_once_of_second(values.clone())
        values += theirs

    def not_once_of_second(mine):
        sent = []
        monkeypatch.setattr(dist, "all_reduce", lambda values: sent.append(values.clone()))
        rest = Counter({k: 1 for k in counts if k not in own or "experts.w" in k[0]})
        not_once(rest, optimizer, model, Experts(1, 2))
        assert sent[0].shape == mine.shape
        return sent[0]

    monkeypatch.setattr(dist, "all_reduce", other_rank)
    assert not_once(own, optimizer, model, Experts(0, 2)) == []


def test_a_step_that_was_not_applied_is_not_judged(parts):
    model, optimizer, _ = parts
    proof = OnceEach(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer)), optimizer, model, ALONE)
    proof.check(applied=False)
    assert optimizer.orthogonalized is not None
    with pytest.raises(RunError, match="orthogonalised 0 times"):
        proof.check(applied=True)
    proof.check(applied=True)  # once


def test_with_adamw_nothing_is_orthogonalised():
    open_world("cpu")
    config = config_of("optim=adamw")
    model = build_model(config.model, seed=0, device="cpu")
    optimizer = build_optimizer(
        config.optim, model, build_clip(config.optim, model), expert_group="ep_size_1", device=torch.device("cpu")
    )
    assert not_once(Counter(), optimizer, model, ALONE) == []
    assert not_once(Counter({("a", 0): 1}), optimizer, model, ALONE) == ["a orthogonalised, but Muon is off"]
    close_world()


def test_a_muon_of_deepspeed_is_refused_before_the_first_step(parts):
    model, optimizer, _ = parts
    engine = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    assert foreign_muon(engine, optimizer, model) == []
    for parameter in model.parameters():
        parameter.use_muon = False  # as DeepSpeed marks what it leaves alone
    assert foreign_muon(engine, optimizer, model) == []
    model.lm_head.weight.use_muon = True
    with pytest.raises(RunError, match=r"use_muon is set on lm_head\.weight: DeepSpeed would orthogonalise"):
        OnceEach(engine, optimizer, model, ALONE)
    model.lm_head.weight.use_muon = False
    optimizer.param_groups[0]["use_muon"] = True
    with pytest.raises(RunError, match="use_muon is set on the parameter group of embedding"):
        OnceEach(engine, optimizer, model, ALONE)
    del optimizer.param_groups[0]["use_muon"]
    other = SimpleNamespace(optimizer=SimpleNamespace(optimizer=torch.optim.SGD(model.parameters())))
    with pytest.raises(RunError, match="DeepSpeed steps a SGD that is not the run's MuonClip"):
        OnceEach(other, optimizer, model, ALONE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_is_asked_for_no_optimizer(parts, precision):
    """An ``optimizer`` of type Muon in its JSON would mark the parameters with use_muon."""
    settings = deepspeed_config(config_of(), world=open_world("cpu"), precision=precision)
    assert "optimizer" not in settings
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    assert not isinstance(parts[1], MuonWithAuxAdam)  # that is what BF16_Optimizer and ZeRO-3 look for
