"""The full Kimi K2 on a thousand ranks, on paper: the targets, and that the docs say what comes out."""

import importlib.util
import sys
from pathlib import Path

import yaml
from muonclip.ownership import assign_owners

from k2train.config import ModelConfig, parse

ROOT = Path(__file__).parents[2]


def benchmark():
    spec = importlib.util.spec_from_file_location("ownership_at_scale", ROOT / "benchmarks" / "ownership_at_scale.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_k2_on_1024_ranks_is_as_even_and_as_cheap_as_the_docs_say():
    at_scale = benchmark()
    roles = at_scale.roles_of(parse(ModelConfig, yaml.safe_load((ROOT / "configs" / "model" / "k2.yaml").read_text())))
    row = at_scale.measure(roles, ranks=1024, expert_parallel=128, buffer_bytes=2**29)
    assert row.imbalance <= 1.05
    assert row.ratio <= 1.25
    # Four exchanges hold their budget at most, or where a matrix is larger than half of it, two such in bfloat16.
    assert row.held <= 4 * max(2**29, 2 * 2 * 18432 * 7168)
    assert at_scale.table([row]).splitlines()[-1] in (ROOT / "docs" / "muonclip-at-scale.md").read_text()


def test_a_hundred_thousand_matrices_over_two_thousand_ranks():
    ranks, each = 2048, 49  # 100,352 equal matrices, cut a third of the way into every 49th
    holders = [{rank: 3} for rank in range(ranks) for _ in range(each - 1)]
    holders += [{rank: 2, (rank + 1) % ranks: 1} for rank in range(ranks)]
    owners = assign_owners([1] * len(holders), holders, ranks=ranks)
    assert owners == [next(iter(held)) for held in holders]
