import errno
import json

import pytest

from k2train.train import lines as module
from k2train.train.lines import Lines


def read(path):
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def always(_):
    return True


def test_lines_that_are_kept_and_one_that_is_torn(path):
    path.write_text('{"n": 1}\n{"n": 2}\n{"n": 3}\n{"n": ')
    lines = Lines(path, keep=lambda value: value["n"] <= 2, say=print)
    lines.write({"n": 9})
    assert read(path) == [1, 2, 9]  # before it is closed: a process may be killed
    lines.close()


class Disk:
    """A file on a disk that has ``space`` bytes left."""

    def __init__(self, file, space):
        self._file, self.space = file, space

    def write(self, data):
        if not self.space:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = self._file.write(bytes(data[: self.space]))
        self.space -= done
        return done

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.fixture
def told():
    return []


def test_a_full_disk_is_told_once_and_nothing_is_lost_when_there_is_space_again(path, told):
    lines = Lines(path, keep=always, say=told.append)
    lines._file = disk = Disk(lines._file, space=10)
    lines.write({"n": 1})  # 9 bytes
    lines.write({"n": 2})
    assert path.read_text() == '{"n": 1}\n{'  # torn, as the disk left it
    lines.write({"n": 3})
    assert told == [f"{path}: the disk is full; the run goes on, and keeps these lines until it can"]
    assert [json.loads(line) for line in module._whole_lines(path)] == [{"n": 1}]
    disk.space = 1000
    lines.write({"n": 4})
    assert read(path) == [1, 2, 3, 4]
    disk.space = 0
    lines.write({"n": 5})
    assert len(told) == 2  # another time
    lines.close()
    assert told[2] == f"{path}: 1 lines could not be written and are lost"
