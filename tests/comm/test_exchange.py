import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from k2train.comm import FailedTogether, close_world, gather_json, open_world, start_max, sum_across, together


def test_one_process_needs_no_launcher():
    world = open_world("cpu")
    try:
        assert (world.rank, world.size, world.main, world.device.type) == (0, 1, True, "cpu")
        assert sum_across([1.5, 2]) == [1.5, 2.0]
        assert gather_json({"a": [1, None]}) == [{"a": [1, None]}]
        assert start_max(15)() == 15
        with pytest.raises(ZeroDivisionError), together():
            raise ZeroDivisionError("own error")
    finally:
        close_world()


def test_cuda_without_a_gpu_is_a_sentence(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"train\.device=cuda.*use train\.device=cpu"):
        open_world("cuda")


def _write_on(rank: int) -> None:
    with together():
        if rank == 1:
            raise ValueError("the disk of rank 1 is full")


def _two_ranks(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    assert gather_json("x" * (10 * rank) + "é") == ["é", "x" * 10 + "é"]
    assert sum_across([rank + 1.0, 1e-9]) == [3.0, 2e-9]
    answers = [start_max(value) for value in (rank, 15 * (1 - rank))]  # two questions on the way at once
    assert [answer() for answer in answers] == [1, 15]
    with pytest.raises(ValueError if rank else FailedTogether, match="disk"):
        _write_on(rank)
    with together():  # all pass: nothing happens
        pass
    dist.destroy_process_group()


def test_two_processes_agree(tmp_path):
    mp.spawn(_two_ranks, args=(str(tmp_path / "store"),), nprocs=2)
