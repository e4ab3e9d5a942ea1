import threading

import pytest
import torch

from k2train.checkpoint import Background, HostCopy, Interval, newest_checkpoint
from tests.checkpoint.small import ALONE, SHAPES, cut, full, save


def test_what_is_written_is_the_step_that_was_saved_though_training_goes_on(tmp_path):
    weights = {name: full(name) for name in SHAPES}
    copy, background, may_write = HostCopy(), Background(), threading.Event()
    for step in (1, 2, 3):
        expected = {name: weight.clone() for name, weight in weights.items()}
        held = copy.take([Interval(name, "master", 0, weight) for name, weight in weights.items()])

        def write(step=step, held=held):
            may_write.wait(10)
            save(tmp_path, step=step, intervals=held)

        background.start(write)
        for weight in weights.values():  # the next step
            weight.mul_(-2).add_(step)
        assert background.busy
        assert not background.done
        may_write.set()
        background.wait()
        may_write.clear()
        assert background.done
        assert not background.busy
        found = newest_checkpoint(tmp_path, world=ALONE, say=pytest.fail)
        assert found.manifest.step == step
        for name, wanted in expected.items():
            assert torch.equal(found.reader.read(name, "master").view(-1), wanted)


def test_the_same_memory_is_used_again():
    copy = HostCopy()
    held = [
        cut("bias", 1, 6),
        Interval("b", "generators", 0, torch.arange(3, dtype=torch.uint8)),
        cut("a.weight", 0, 9),
    ]
    first, second = copy.take(held), copy.take(held)
    assert [i.values.data_ptr() for i in first] == [i.values.data_ptr() for i in second]
    assert all(torch.equal(a.values, b.values) and a.tensor == b.tensor for a, b in zip(second, held, strict=True))


def test_pieces_of_one_memory_in_any_order_come_back_as_they_were():
    master, momentum = torch.randn(100), torch.randn(100).bfloat16()
    places = [(0, 10), (10, 40), (55, 100), (40, 40)]  # with a gap, and one that is empty
    held = [Interval("w", key, a, flat[a:b]) for a, b in places for key, flat in (("m", master), ("v", momentum))]
    held += [Interval("strided", "m", 0, master[::3])]
    expected = [i.values.clone() for i in held]
    copies = HostCopy().take(held)
    master.zero_(), momentum.zero_()
    assert [(c.key, c.start) for c in copies] == [(i.key, i.start) for i in held]
    for copy, wanted in zip(copies, expected, strict=True):
        assert copy.values.dtype == wanted.dtype
        assert torch.equal(copy.values, wanted)


def test_what_the_work_raises_comes_out_where_it_is_waited_for():
    background = Background()
    background.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.wait()
    background.wait()  # once
    background.start(lambda: None)
    background.wait()
