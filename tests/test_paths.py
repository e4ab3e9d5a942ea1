import errno
import os
from pathlib import Path

import pytest

from k2train.paths import atomic_write, cache_dir, config_dir, explain_oserror


def test_cache_dir_follows_override_then_xdg_then_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir("/else") == Path("/else")
    assert cache_dir(None) == Path("/xdg/k2train")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir(None) == Path("/home/me/.cache/k2train")


def test_configs_are_found():
    assert (config_dir() / "train.yaml").is_file()


def test_a_write_into_no_folder_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        atomic_write(tmp_path / "nowhere" / "plan.svg", "")
    assert raised.value.filename == str(tmp_path / "nowhere" / "plan.svg")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~_umask())

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EACCES, "no permission"), (errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EIO, "error")],
)
def test_os_errors_become_sentences(number, words):
    assert words in explain_oserror(OSError(number, os.strerror(number), "/some/file"))
    assert "/some/file" in explain_oserror(OSError(number, os.strerror(number), "/some/file"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
