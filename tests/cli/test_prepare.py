"""``k2train prepare`` on a folder of one's own."""

import pytest

from k2train.cli import main


@pytest.fixture
def words(tmp_path):
    return [f"data.cache_dir={tmp_path / 'cache'}", "data=folder", "data.tokenizer.vocab_size=300"]


def test_prepared_once(tmp_path, words, capsys):
    for number in range(8):
        path = tmp_path / "text" / f"part{number}" / "code.py"
        path.parent.mkdir(parents=True)
        path.write_text(f"def function_{number}():\n    return {number}\n" * 20)
    words.append(f"data.path={tmp_path / 'text'}")
    assert main(["prepare", *words]) == 0
    first = capsys.readouterr().out
    assert "preparing the data: encoding the text" in first
    assert "held out" in first
    assert "bytes a token" in first
    assert main(["prepare", *words]) == 0
    again = capsys.readouterr().out
    assert "preparing" not in again
    assert again.splitlines()[-1] == first.splitlines()[-1]


def test_no_text(tmp_path, words, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        assert main(["prepare", *words, f"data.path={tmp_path / folder}"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("k2train: error: ")
        assert folder in err
        assert err.count("\n") == 1


def test_no_folder_given(words, capsys):
    assert main(["prepare", *words]) == 2
    assert "data.path is missing" in capsys.readouterr().err


def test_show(tmp_path, words, capsys):
    for number in range(8):
        path = tmp_path / "text" / f"part{number}" / "code.py"
        path.parent.mkdir(parents=True)
        path.write_text(f"def function_{number}():\n    return {number}\n" * 20)
    words.append(f"data.path={tmp_path / 'text'}")
    assert main(["data", "show", *words]) == 0
    shown = capsys.readouterr().out
    assert "preparing the data" in shown
    assert "folder, train: part" in shown
    assert "folder, held out: part" in shown
    assert "def function_" in shown
    folder = shown.splitlines()[-1].removeprefix("data: ")
    assert main(["data", "show", folder]) == 0
    assert capsys.readouterr().out in shown
    assert main(["data", "show", *words, f"data.path={tmp_path / 'nowhere'}"]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err
