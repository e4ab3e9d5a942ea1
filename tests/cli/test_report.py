import pytest
from made_runs import make_run, step

from k2train.cli import main


def test_the_page_of_a_run_goes_to_its_folder(tmp_path, capsys):
    folder = make_run(tmp_path / "r", [step(1), step(2)], torn="{")
    assert main(["report", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder / 'report.html'}\n"
    assert err == f"k2train: {folder}: 1 damaged line is left out\n"
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_the_page_of_several_goes_where_one_says(tmp_path, monkeypatch, capsys):
    folders = [str(make_run(tmp_path / name, [step(1)])) for name in "ab"]
    assert main(["report", *folders, "--to", str(tmp_path / "both.html"), "--x", "tokens"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["report", *folders]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "both.html"), "report.html"]
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "there is no such folder"), ("empty", "it has no config.json")]
)
def test_no_run_is_one_sentence(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / name)]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    folder = make_run(tmp_path / "r", [step(1)])
    assert main(["report", str(folder), "--to", str(tmp_path / "none" / "page.html")]) == 1
    assert "it does not exist; check the path" in capsys.readouterr().err
