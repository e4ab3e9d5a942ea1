"""What a rank gives to collectives in a step, by kind.

Bytes are those of the tensor that is reduced, gathered or exchanged: the whole of it, as the ``size`` of nccl-tests
(doc/PERFORMANCE.md of NVIDIA's nccl-tests), not what a ring sends of it. A group of one rank sends nothing and is left
out. What DeepSpeed 0.19 calls was read off its source and off runs with a counter (tests/plan/collectives.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from k2train.plan.exchange import Exchange
from k2train.plan.layout import REDUCE_BUCKET, REUSE_DISTANCE, Flat, Layout, Step

KINDS = ("gradient reduce", "parameter gather", "expert all-to-all", "sequence all-to-all", "Muon exchange", "counts")


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind among one kind of ranks, in a step."""

    kind: str
    operation: str  # all_reduce | reduce_scatter | all_gather | all_to_all
    bytes: float
    calls: int
    ranks: int
    stride: int  # between these ranks


def traffic(layout: Layout, step: Step, exchange: Exchange) -> list[Traffic]:
    """All of a step, on a rank; of Muon's exchange that with most, of the experts' rows as many as go to others' if
    routing is even."""
    found = [*_reductions(layout, step), *_gathers(layout, step), *_experts(layout, step), *_sequences(layout, step)]
    if exchange.most:
        found.append(Traffic("Muon exchange", "all_to_all", exchange.most, 2 * exchange.rounds, layout.ranks, 1))
    found.append(_counts(layout))
    return [one for one in found if one.ranks > 1 and one.bytes]


def by_kind(found: list[Traffic]) -> dict[str, float]:
    """Bytes of each kind."""
    return {
        kind: sum(one.bytes for one in found if one.kind == kind)
        for kind in KINDS
        if any(one.kind == kind for one in found)
    }


def _kinds(layout: Layout) -> Iterator[tuple[int, int, list[Flat]]]:
    """Ranks and stride of the flat tensors that are reduced together: dense, and experts."""
    dense = [flat for flat in layout.flats if flat.role != "expert"]
    experts = [flat for flat in layout.flats if flat.role == "expert"]
    for flats in (dense, experts):
        if flats:
            yield flats[0].ranks, flats[0].stride, flats


def _reductions(layout: Layout, step: Step) -> Iterator[Traffic]:
    """Gradients, in the dtype of the weights.

    Stage 1 reduces once a step, stages 2 and 3 after each micro-batch, as they keep no whole sum. At stages 1 and 2
    DeepSpeed reduces each bucket by an all-reduce and drops what is not its own (``use_multi_rank_bucket_allreduce``),
    which sends twice what a reduce-scatter would.
    """
    for ranks, stride, flats in _kinds(layout):
        times = 1 if layout.zero_stage == 1 else step.micro_batches
        size = sum(flat.padded if layout.zero_stage == 3 else flat.elements for flat in flats)
        operation = "reduce_scatter" if layout.zero_stage == 3 else "all_reduce"
        calls = times * -(-size // REDUCE_BUCKET)
        yield Traffic("gradient reduce", operation, times * size * layout.weight_bytes, calls, ranks, stride)


def _gathers(layout: Layout, step: Step) -> Iterator[Traffic]:
    """Weights.

    Stages 1 and 2 gather all of them once, after the update. Stage 3 gathers them in the forward pass of each
    micro-batch, and again in its backward pass those that were dropped in between: which come again after more than
    ``stage3_max_reuse_distance`` elements, there and back. Vectors stay, and are gathered after the update.
    """
    width = layout.weight_bytes
    if layout.zero_stage < 3:
        for ranks, stride, flats in _kinds(layout):
            size = sum(flat.padded for flat in flats)
            yield Traffic("parameter gather", "all_gather", size * width, len(flats), ranks, stride)
        return
    after = sum(p.elements for p in layout.local)
    gathered = {"dense": 0, "expert": 0}
    ranks_of = {"dense": layout.ranks, "expert": layout.ranks // layout.expert_parallel}
    calls = dict.fromkeys(gathered, 0)
    for p in layout.local:
        after -= p.elements
        kind = "expert" if p.role == "expert" else "dense"
        whole = ranks_of[kind] * -(-p.elements // ranks_of[kind])
        times = 1 if layout.persists(p) else step.micro_batches * (1 + (2 * after > REUSE_DISTANCE))
        gathered[kind] += times * whole
        calls[kind] += times
    for kind, stride in (("dense", 1), ("expert", layout.expert_parallel)):
        yield Traffic("parameter gather", "all_gather", gathered[kind] * width, calls[kind], ranks_of[kind], stride)


def _experts(layout: Layout, step: Step) -> Iterator[Traffic]:
    """Rows to their experts and back, forward and backward, and how many there are of each expert.

    The rows that a rank sends are its tokens times K, those that stay with it included; those that it sends back are as
    many as it got, which is the same if routing is even, and in the sum over ranks in any case. Where whole layers are
    computed again, rows travel again.
    """
    model, ep = layout.config.model, layout.expert_parallel
    if ep == 1:
        return
    layers = model.num_hidden_layers - model.first_k_dense_replace
    rows = step.tokens * model.num_experts_per_tok * model.hidden_size * layout.weight_bytes
    again = layout.config.train.activation_checkpointing == "full"
    passes = layers * step.micro_batches
    counts = 8 * model.n_routed_experts * (1 + again)
    yield Traffic(
        "expert all-to-all", "all_to_all", passes * (rows * (4 + 2 * again) + counts), passes * (5 + 3 * again), ep, 1
    )


def _sequences(layout: Layout, step: Step) -> Iterator[Traffic]:
    """Ulysses (arXiv 2309.14509, section 3.2): queries, keys and values to heads, outputs back; backward the same,
    after those of the forward pass once more where attention is computed again.
    """
    sp, model = layout.sequence_parallel, layout.config.model
    if sp == 1:
        return
    widths = 2 * (model.qk_nope_head_dim + model.qk_rope_head_dim) + 2 * model.v_head_dim
    once = step.tokens * model.num_attention_heads * widths * layout.weight_bytes
    again = layout.config.train.activation_checkpointing != "none"
    passes = model.num_hidden_layers * step.micro_batches * (2 + again)
    yield Traffic("sequence all-to-all", "all_to_all", passes * once, 2 * passes, sp, 1)


def _counts(layout: Layout) -> Traffic:
    """The routers' loads (int64) and the largest logit of each head (fp32), once a step."""
    model = layout.config.model
    loads = 8 * (model.num_hidden_layers - model.first_k_dense_replace) * model.n_routed_experts
    return Traffic(
        "counts", "all_reduce", loads + 4 * model.num_hidden_layers * model.num_attention_heads, 2, layout.ranks, 1
    )
