"""How evenly Newton-Schulz is shared out over many ranks, and what that sends: on paper, by the code that trains.

    python benchmarks/ownership_at_scale.py                                  # Kimi K2, the table of the docs
    python benchmarks/ownership_at_scale.py --model moonlight-16b --ranks 64 --expert-parallel 1 8

Shapes come from the model on the meta device, owners and rounds from ``muonclip.plan``, as in training. The layout is
that of DeepSpeed's ZeRO 1 and 2: each role's parameters flat in order and cut over all ranks, those of experts
([E / ep, ...] on a rank) over the ranks that have the same experts, which are ``ep`` apart. No tensor is made.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import yaml
from muonclip import split_parameters
from muonclip.ownership import newton_schulz_cost
from muonclip.plan import Piece, Plan, Shape, Task, cut, plan_together

from k2train.config import MUON_ROLES, ModelConfig, parse
from k2train.model import build_model
from k2train.paths import config_dir

BYTES = 2  # of an element: bfloat16, of gradients, weights and the exchange alike
Named = Sequence[tuple[str, Shape]]


@dataclass(frozen=True)
class Row:
    """One number of ranks and one degree of expert parallelism."""

    ranks: int
    expert_parallel: int
    imbalance: float  # largest over mean of the ranks' multiply-adds
    one_by_one: float  # the same if every role is waited for before the next one begins
    far: int  # matrices that go to a rank which holds nothing of them
    rounds: int
    sent_mean: float  # bytes a rank sends in a step for the exchange, there and back
    sent_max: float
    held: float  # bytes of buffers on a rank, at most
    adamw: float  # bytes a rank sends for gradients and weights, as with any optimizer
    seconds: float  # to plan for all ranks; in training each rank plans for its own groups alone

    @property
    def ratio(self) -> float:
        """All that the rank with most sends, over what it would send with AdamW."""
        return (self.adamw + self.sent_max) / self.adamw


def roles_of(config: ModelConfig) -> dict[str, Named]:
    """Name and shape of each parameter by role, in flat order."""
    model = build_model(config, seed=0, device="meta")
    groups = split_parameters(model.named_parameters(), model.parameter_roles())
    return {group["role"]: [(name, tuple(p.shape)) for name, p in group["params"]] for group in groups}


def flat(named: Named, ranks: int) -> tuple[tuple[Piece, ...], ...]:
    """Cut as DeepSpeed does: shards of equal, even size."""
    sizes = [math.prod(shape) for _, shape in named]
    offsets = accumulate(sizes, initial=0)
    parameters = [(name, shape, offset) for (name, shape), offset in zip(named, offsets, strict=False)]
    return cut(parameters, ranks=ranks, size=2 * -(-sum(sizes) // (2 * ranks)))


def measure(roles: Mapping[str, Named], *, ranks: int, expert_parallel: int, buffer_bytes: int) -> Row:
    """Plans all of a model's exchanges and adds them up."""

    def task(named: Named, members: Sequence[int]) -> Task:
        return Task(flat(named, len(members)), members, newton_schulz_cost, buffer_bytes // BYTES)

    begin, load = time.perf_counter(), dict[int, float]()
    dense = [task(named, range(ranks)) for role, named in roles.items() if role in MUON_ROLES and role != "expert"]
    relief = {rank: rank % expert_parallel for rank in range(ranks)}
    plans = [(t, p) for t, p in zip(dense, plan_together(dense, split={}, relief=relief, load=load), strict=True)]
    experts = [(name, (shape[0] // expert_parallel, *shape[1:])) for name, shape in roles.get("expert", [])]
    for number in range(expert_parallel if experts else 0):
        its = task(experts, range(number, ranks, expert_parallel))
        plans += [(its, plan) for plan in plan_together([its], split={}, relief=relief, load=load)]
    seconds = time.perf_counter() - begin
    sent, held, one_by_one = [0] * ranks, [0] * ranks, [0.0] * len(dense) + [0.0]
    for place, (t, plan) in enumerate(plans):
        for rank, traffic in zip(t.members, plan.traffic(), strict=True):
            sent[rank] += BYTES * traffic.sent
            held[rank] += BYTES * traffic.buffers
        step = min(place, len(dense))  # the experts' groups work at the same time
        one_by_one[step] = max(one_by_one[step], *plan.costs)
    mean = sum(load.values()) / ranks
    return Row(
        ranks,
        expert_parallel,
        imbalance=max(load.values()) / mean,
        one_by_one=sum(one_by_one) / mean,
        far=sum(_far(plan) for _, plan in plans),
        rounds=max(len(plan.rounds) for _, plan in plans),
        sent_mean=statistics.mean(sent),
        sent_max=max(sent),
        held=max(held),
        adamw=_zero_bytes(roles, experts, ranks=ranks, expert_parallel=expert_parallel),
        seconds=seconds,
    )


def _far(plan: Plan) -> int:
    return sum(all(part.rank != m.owner for part in m.parts) for m in plan.matrices)


def _zero_bytes(roles: Mapping[str, Named], experts: Named, *, ranks: int, expert_parallel: int) -> float:
    """What a rank sends: gradients reduced to shards, weights gathered from them; (n - 1) / n of the elements each."""
    dense = sum(_elements(named) for role, named in roles.items() if role != "expert")
    copies = ranks // expert_parallel
    return 2 * BYTES * (dense * (ranks - 1) / ranks + _elements(experts) * (copies - 1) / copies)


def _elements(named: Named) -> int:
    return sum(math.prod(shape) for _, shape in named)


def table(rows: Iterable[Row]) -> str:
    """In Markdown."""
    columns = ("ranks", "ep", "max / mean", "role by role", "far", "rounds", "sent, mean", "sent, max", "held")
    columns += ("AdamW sends", "ratio")
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for r in rows:
        sizes = (f"{value / 1e9:.3f}" for value in (r.sent_mean, r.sent_max, r.held))
        lines.append(
            f"| {r.ranks} | {r.expert_parallel} | {r.imbalance:.3f} | {r.one_by_one:.2f} | {r.far} | {r.rounds} | "
            + " | ".join(sizes)
            + f" | {r.adamw / 1e9:.1f} | {r.ratio:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table; gigabytes are 1e9 bytes, per rank and step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="k2", help="a name in configs/model whose vocab_size is a number")
    parser.add_argument("--ranks", type=int, nargs="+", default=[256, 1024, 1536, 2048])
    parser.add_argument("--expert-parallel", type=int, nargs="+", default=[16, 64, 128, 384])
    parser.add_argument("--buffer-bytes", type=int, default=2**29, help="MuonClip's exchange_buffer_bytes")
    args = parser.parse_args()
    config = parse(ModelConfig, yaml.safe_load((config_dir() / "model" / f"{args.model}.yaml").read_text()))
    roles = roles_of(config)
    matrices = sum(shape[0] if len(shape) == 3 else 1 for r in MUON_ROLES for _, shape in roles.get(r, []))
    print(f"{args.model}: {sum(map(_elements, roles.values())):,} parameters, {matrices:,} matrices of Muon\n")
    rows = [
        measure(roles, ranks=ranks, expert_parallel=ep, buffer_bytes=args.buffer_bytes)
        for ranks in args.ranks
        for ep in args.expert_parallel
        if ranks % ep == 0
    ]
    print(table(rows))
    print(f"\nPlanned for all ranks in {max(row.seconds for row in rows):.1f} s at most.")


if __name__ == "__main__":
    main()
