import pytest

from k2train.config import ScheduleConfig
from k2train.train.schedule import lr_factor


def _factors(steps, **fields):
    defaults = {"steps": steps, "tokens": None, "warmup_steps": 0, "decay_fraction": 0.0, "decay_shape": "linear"}
    schedule = ScheduleConfig(**{**defaults, "final_lr_ratio": 0.1, **fields})
    return [lr_factor(step, steps=steps, schedule=schedule) for step in range(steps)]


def test_warmup_stable_decay():
    factors = _factors(10, warmup_steps=4, decay_fraction=0.3)
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.7, 0.4, 0.1])


def test_constant_without_warmup_or_decay():
    assert _factors(5) == [1.0] * 5


def test_cosine_is_halfway_in_the_middle_and_ends_at_the_final_ratio():
    factors = _factors(8, decay_fraction=1.0, decay_shape="cosine", final_lr_ratio=0.2)
    assert factors[3] == pytest.approx(0.6)
    assert factors[-1] == pytest.approx(0.2)
    assert factors == sorted(factors, reverse=True)


def test_warmup_may_overlap_decay():
    assert all(0 < f <= 1 for f in _factors(4, warmup_steps=4, decay_fraction=1.0))
