"""What Muon's exchange sends and holds, and how even its work is: by ``muonclip.plan``, the code that trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from muonclip.ownership import newton_schulz_cost
from muonclip.plan import Plan, Task, plan_together

from k2train.config import MUON_ROLES
from k2train.plan.layout import Flat, Layout

EVERY_GROUP = 64  # ranks up to which all groups that share experts are planned; above, one stands for all
MOST_PIECES = 200_000  # at stage 3 every rank has a piece of everything: above, bounds take the place of a plan
NEWTON_SCHULZ_STEPS = 5  # of both choices of optim.newton_schulz_coefficients


@dataclass(frozen=True)
class Exchange:
    """Of a step."""

    sent: tuple[int, ...]  # bytes given to all-to-alls by each planned rank
    rounds: int  # two all-to-alls each
    buffers: int  # bytes held for them, at most
    flops: float  # of Newton-Schulz on the busiest rank
    mean_flops: float

    @property
    def mean(self) -> float:
        """Bytes that a rank sends."""
        return sum(self.sent) / len(self.sent) if self.sent else 0.0

    @property
    def most(self) -> int:
        """Bytes that the rank with most sends."""
        return max(self.sent, default=0)


def muon_exchange(layout: Layout, *, exact: bool = True) -> Exchange:
    """The exchange of a run.

    Args:
        layout: of the run.
        exact: by the plan itself; else by bounds, in no time: each part goes to an owner elsewhere and its result comes
            back, work is even, and buffers are full.
    """
    if not layout.config.optim.muon_roles:
        return Exchange((), 0, 0, 0.0, 0.0)
    flats = [flat for flat in layout.flats if flat.role in MUON_ROLES]
    pieces = sum(flat.ranks * len(flat.parameters) for flat in flats)
    if exact and (layout.zero_stage < 3 or pieces <= MOST_PIECES):
        return _planned(layout, flats)
    return _bounds(layout, flats)


def _itemsize(layout: Layout) -> int:
    return 2 if layout.config.optim.exchange_dtype == "bf16" else 4


def _cost(flat: Flat) -> float:
    """Multiply-adds for all matrices that the ranks of a flat tensor have in common."""
    return sum(
        (p.shape[0] if len(p.shape) == 3 else 1) * newton_schulz_cost(*p.shape[-2:], steps=NEWTON_SCHULZ_STEPS)
        for p in flat.parameters
    )


def _bounds(layout: Layout, flats: Sequence[Flat]) -> Exchange:
    size, limit = _itemsize(layout), layout.config.optim.exchange_buffer_bytes
    parts = [2 * size * flat.elements * (flat.ranks - 1) // flat.ranks**2 for flat in flats]
    flops = 2 * sum(_cost(flat) / flat.ranks for flat in flats)
    return Exchange(
        (sum(parts),),
        sum(-(-part // limit) for part in parts),
        sum(min(part, limit) for part in parts),
        flops,
        flops,
    )


def _planned(layout: Layout, flats: Sequence[Flat]) -> Exchange:
    size, ep = _itemsize(layout), layout.expert_parallel
    buffer_elements = layout.config.optim.exchange_buffer_bytes // size
    cost = partial(newton_schulz_cost, steps=NEWTON_SCHULZ_STEPS)
    load: dict[int, float] = {}

    def plans(flats: Sequence[Flat], first: int) -> list[tuple[Task, Plan]]:
        tasks = [Task(flat.pieces(), range(first, layout.ranks, flat.stride), cost, buffer_elements) for flat in flats]
        relief = {rank: rank % ep for rank in range(layout.ranks)} if ep > 1 else {}
        return list(zip(tasks, plan_together(tasks, split={}, relief=relief, load=load), strict=True))

    found = plans([flat for flat in flats if flat.role != "expert"], 0)
    experts = [flat for flat in flats if flat.role == "expert"]
    groups = ep if layout.ranks <= EVERY_GROUP else 1
    for number in range(groups if experts else 0):
        found += plans(experts, number)
    planned = range(layout.ranks) if groups == ep else range(0, layout.ranks, ep)
    sent, held = dict.fromkeys(range(layout.ranks), 0), dict.fromkeys(range(layout.ranks), 0)
    for task, plan in found:
        for rank, traffic in zip(task.members, plan.traffic(), strict=True):
            sent[rank] += size * traffic.sent
            # BF16_Optimizer has all roles under way at once, the others one after the other.
            bytes_held = size * traffic.buffers
            held[rank] = held[rank] + bytes_held if layout.whole_gradients else max(held[rank], bytes_held)
    return Exchange(
        tuple(sent[rank] for rank in planned),
        sum(len(plan.rounds) for _, plan in found[: len(flats)]),
        max(held[rank] for rank in planned),
        2 * max(load[rank] for rank in planned),
        2 * sum(load[rank] for rank in planned) / len(planned),
    )
