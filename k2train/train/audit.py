"""Proof that a run updates its weights as its config says.

The cheap part comes with every run: after the first applied step each matrix of Muon must have been orthogonalised
exactly once over all ranks, and by MuonClip. DeepSpeed has a Muon of its own, which switches itself on by an attribute
of a parameter or a key of a group, and which several of its configurations silently do not run at all. The whole
audit measures what one step did to each parameter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from muonclip import MuonClip
from muonclip.audit import ElementUpdate, MatrixUpdate, Rule, StepAudit, adamw_fault, adamw_rms, rules

from k2train.comm import gather_json
from k2train.config import MUON_ROLES
from k2train.model import Transformer
from k2train.train.errors import RunError
from k2train.train.own_optimizer import AnyOptimizer
from k2train.train.state import Experts, shapes
from k2train.train.zero import whole_shape

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer

NAMED = 3  # parameters that a sentence names


class OnceEach:
    """Counts orthogonalisations until a step has been applied, and refuses to go on unless each matrix had one."""

    def __init__(self, engine: Any, optimizer: AnyOptimizer, model: Transformer, experts: Experts) -> None:
        """Looks at what can be seen before a step.

        Raises:
            RunError: DeepSpeed is about to use a Muon of its own, or another optimizer than ours.
        """
        self._engine, self._optimizer, self._model, self._experts = engine, optimizer, model, experts
        _refuse(foreign_muon(engine, optimizer, model))
        optimizer.orthogonalized = Counter()

    def check(self, *, applied: bool) -> None:
        """Judges after the first applied step, all ranks together and alike; then, and before, does nothing.

        Raises:
            RunError: a matrix was not orthogonalised exactly once; it is named.
        """
        counts = self._optimizer.orthogonalized
        if counts is None or not applied:
            return
        self._optimizer.orthogonalized = None
        _refuse(foreign_muon(self._engine, self._optimizer, self._model))
        _refuse(not_once(counts, self._optimizer, self._model, self._experts))


def foreign_muon(engine: Any, optimizer: AnyOptimizer, model: Transformer) -> list[str]:
    """Why another Muon than ours would run, a sentence each (DeepSpeed 0.19, ``runtime/zero/stage_1_and_2.py``)."""
    found = []
    inner = getattr(engine.optimizer, "optimizer", None)
    if inner is not optimizer:
        found.append(f"DeepSpeed steps a {type(inner).__name__} that is not the run's MuonClip")
    if marked := [name for name, p in model.named_parameters() if getattr(p, "use_muon", False)]:
        found.append(
            f"use_muon is set on {_some(marked)}: DeepSpeed would orthogonalise the gradient by a Muon of its own "
            "before MuonClip does; remove the attribute"
        )
    if groups := [str(group.get("role")) for group in optimizer.param_groups if group.get("use_muon")]:
        found.append(f"use_muon is set on the parameter group of {_some(groups)}: remove the key")
    return found


def not_once(
    counts: Counter[tuple[str, int]], optimizer: AnyOptimizer, model: Transformer, experts: Experts
) -> list[str]:
    """Which matrices were not orthogonalised exactly once, a sentence each, the same on all ranks.

    What should have been is told by the model's roles, not by the optimizer's groups.

    Args:
        counts: of this rank, by parameter and number of the matrix in it.
        optimizer: it is asked whether it is meant to use Muon at all.
        model: names, shapes and roles.
        experts: where this rank's experts lie among all.
    """
    if all(group["algorithm"] != "muon" for group in optimizer.param_groups):
        return [] if not counts else [f"{_some(sorted({n for n, _ in counts}))} orthogonalised, but Muon is off"]
    roles = model.parameter_roles()
    muon = {n: whole_shape(p) for n, p in model.named_parameters() if roles[n] in MUON_ROLES}
    expected = {name: shape[0] if len(shape) == 3 else 1 for name, shape in muon.items()}
    labels, mine = [], []  # of all matrices, and how often this rank orthogonalised each
    for name, here in expected.items():
        total, first = (here * experts.size, here * experts.rank) if roles[name] == "expert" else (here, 0)
        labels += [f"{name}[{number}]" if total > 1 else name for number in range(total)]
        mine += [counts[name, number - first] for number in range(total)]
    everywhere = torch.tensor(mine, dtype=torch.int32, device=next(model.parameters()).device)
    dist.all_reduce(everywhere)
    wrong: dict[int, list[str]] = {}
    for label, times in zip(labels, everywhere.tolist(), strict=True):
        if times != 1:
            wrong.setdefault(times, []).append(label)
    sentences = [f"{_some(found)} orthogonalised {times} times, not once" for times, found in sorted(wrong.items())]
    if strangers := sorted({name for name, _ in counts} - expected.keys()):
        sentences.append(f"{_some(strangers)} orthogonalised, whose role is none of {', '.join(MUON_ROLES)}")
    return sentences


def _refuse(sentences: Sequence[str]) -> None:
    if sentences:
        raise RunError("the weights are not updated as the config says: " + "; ".join(sentences))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# ---- the whole audit

Range = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """A parameter: how it is updated, and what a step did to it. Ranges are over its matrices, on all ranks."""

    rule: Rule
    matrices: int  # on all ranks; 0 for AdamW
    singular: Range | None  # of the orthogonalised update
    expected_singular: Range | None
    rms: Range  # of the update before the learning rate
    expected_rms: Range
    fault: str | None


def audit(trainer: Trainer) -> list[Row]:
    """Takes the first step of a run and measures it; called by all ranks, which get the same rows.

    Raises:
        RunError: the run has begun, its gradient is not finite, or a Muon of DeepSpeed's is switched on.
    """
    optimizer = trainer.optimizer
    assert isinstance(optimizer, MuonClip), "the command refuses others"
    _refuse(foreign_muon(trainer.engine, optimizer, trainer.model))
    with StepAudit(optimizer) as measured:
        if not trainer.step():
            raise RunError("the gradient of the first step is not finite: there is nothing to audit")
    everywhere = gather_json(
        {
            "matrices": [asdict(m) for m in measured.matrices],
            "elements": [asdict(e) for e in measured.elements],
        }
    )
    matrices: dict[str, list[MatrixUpdate]] = {}
    elements: dict[str, list[ElementUpdate]] = {}
    for rank in everywhere:
        for values in rank["matrices"]:
            matrices.setdefault(values["name"], []).append(MatrixUpdate(**values))
        for values in rank["elements"]:
            elements.setdefault(values["name"], []).append(ElementUpdate(**values))
    rows, order = [], {name: place for place, name in enumerate(trainer.state.roles)}
    for rule in sorted(rules(optimizer), key=lambda rule: order[rule.name]):
        copies = trainer.state.experts.size if trainer.state.roles[rule.name] == "expert" else 1
        if rule.algorithm == "muon":
            rows.append(_matrix_row(rule, matrices.get(rule.name, []), expected=len(rule.matrices) * copies))
        else:
            rows.append(_element_row(rule, elements.get(rule.name, []), expected=math.prod(rule.shape) * copies))
    return rows


@dataclass(frozen=True)
class Placement:
    """Where a parameter lies, and who orthogonalises it, over all ranks and with the experts of all."""

    name: str
    intervals: tuple[tuple[int, int, int], ...]  # rank, start, stop in the flattened parameter; sorted by start
    owners: tuple[int, ...]  # the rank of each matrix, in order; empty for AdamW


def placements(trainer: Trainer) -> list[Placement]:
    """Of every parameter; called by all ranks, which get the same.

    Raises:
        RunError: the ranks do not hold each element once, or a matrix has no owner, or two.
    """
    held, owned = [], []
    for shard in trainer.state.held:
        for piece in shard.pieces:
            start = trainer.state.experts.start(piece, expert=trainer.state.roles[piece.name] == "expert")
            held.append([piece.name, start, start + piece.stop - piece.start])
    optimizer = trainer.optimizer
    assert isinstance(optimizer, MuonClip), "the command refuses others"
    for tensor, group in optimizer.tensors():
        if group["algorithm"] == "muon":
            for name, number in optimizer.exchange(tensor, group).owned:
                here = len(optimizer.matrix_shapes(name)) if trainer.state.roles[name] == "expert" else 0
                owned.append([name, number + trainer.state.experts.rank * here])
    intervals: dict[str, list[tuple[int, int, int]]] = {name: [] for name in trainer.state.roles}
    owners: dict[str, list[tuple[int, int]]] = {name: [] for name in trainer.state.roles}
    for rank, one in enumerate(gather_json({"held": held, "owned": owned})):
        for name, start, stop in one["held"]:
            intervals[name].append((rank, start, stop))
        for name, number in one["owned"]:
            owners[name].append((number, rank))
    found, whole = [], shapes(trainer.model, trainer.state.roles, trainer.state.experts)
    for name in trainer.state.roles:
        parts, numbered = sorted(intervals[name], key=lambda part: part[1]), sorted(owners[name])
        edges = [0, *(stop for _, _, stop in parts)]
        if edges[:-1] != [start for _, start, _ in parts] or edges[-1] != math.prod(whole[name]):
            raise RunError(f"the ranks do not hold each element of {name} once: (rank, start, stop) {parts}")
        if [number for number, _ in numbered] != list(range(len(numbered))):
            raise RunError(f"not every matrix of {name} has one owner: (matrix, rank) {numbered}")
        found.append(Placement(name, tuple(parts), tuple(rank for _, rank in numbered)))
    return found


def _matrix_row(rule: Rule, found: Sequence[MatrixUpdate], *, expected: int) -> Row:
    faults = [fault for m in found if (fault := m.fault())]
    if len(found) != expected:
        faults.insert(0, f"{len(found)} of {expected} matrices seen")
    return Row(
        rule,
        expected,
        _range([v for m in found for v in m.singular]),
        _range([v for m in found for v in m.expected]),
        _range([m.rms for m in found]),
        _range([m.expected_rms for m in found]),
        _summary(faults),
    )


def _element_row(rule: Rule, found: Sequence[ElementUpdate], *, expected: int) -> Row:
    seen = sum(part.elements for part in found)
    if seen != expected:
        nothing = (math.nan, math.nan)
        return Row(rule, 0, None, None, nothing, nothing, f"{seen} of {expected} elements seen")
    rms, expected_rms = adamw_rms(found)
    return Row(rule, 0, None, None, (rms, rms), (expected_rms, expected_rms), adamw_fault(found))


def _range(values: Sequence[float]) -> Range:
    return (min(values), max(values)) if values else (math.nan, math.nan)


def _summary(faults: Sequence[str]) -> str | None:
    more = f" ({len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{faults[0]}{more}" if faults else None
