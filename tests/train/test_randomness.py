import random

import numpy as np
import pytest
import torch

from k2train.train.randomness import generator_states, seed_generators, set_generator_states

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_before():
    before = generator_states(CPU)
    yield
    set_generator_states(before, CPU)


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_drawing_goes_on_where_it_was():
    draw()  # gauss and randn keep every other number for the next call
    kept = generator_states(CPU)
    expected = [draw(), draw()]
    seed_generators(3, rank=0, step=0)
    set_generator_states(kept, CPU)
    assert [draw(), draw()] == expected


def test_seed_rank_and_step_decide_all_numbers():
    drawn = []
    for arguments in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        seed, rank, step = arguments
        seed_generators(seed, rank=rank, step=step)
        drawn.append(draw())
    assert drawn[0] == drawn.pop()
    assert all(len(set(numbers)) == 4 for numbers in zip(*drawn, strict=True))
