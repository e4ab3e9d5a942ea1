"""What a person is told when a run cannot start or go on: one clear sentence, no traceback, a status that says so."""

import subprocess


def _refused(result: subprocess.CompletedProcess, *words: str, status: int) -> None:
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("k2train: error: ")
    for word in words:
        assert word in result.stderr


def test_a_world_size_that_does_not_divide(runner, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(key, value)
    result = runner.run("undivided", "parallel.expert_parallel=2")
    _refused(
        result,
        "train.global_batch_size=8 does not divide over 3 processes",
        "parallel.expert_parallel=2 does not divide the 3 processes",
        status=2,
    )


def test_a_missing_corpus(runner):
    result = runner.run("missing", f"data.path={runner.folder / 'nowhere'}")
    _refused(result, "nowhere", status=1)


def test_an_empty_corpus_after_a_failed_start_with_other_settings(runner):
    empty = runner.folder / "empty"
    empty.mkdir()
    result = runner.run("missing", f"data.path={empty}")
    _refused(result, str(empty), status=1)


def test_a_folder_that_cannot_be_written(runner):
    (runner.folder / "file").touch()
    result = runner.run("unwritable", f"runs_dir={runner.folder / 'file'}")
    _refused(result, "a part of the path is a file", status=1)


def test_a_vocabulary_that_is_too_small(runner):
    result = runner.run("narrow", "model.vocab_size=300")
    _refused(result, "model.vocab_size=300 is less than the 512 tokens of the tokenizer", status=1)
    log = (runner.runs / "narrow" / "logs" / "rank-0.log").read_text()
    assert "Traceback" in log  # for whoever wants to know more


def test_a_full_disk_and_going_on_when_there_is_space(runner, small_disk):
    settings = (f"runs_dir={small_disk.folder}", "faults.save_within=1")
    result = runner.run("full", *settings)
    _refused(result, "MiB free: make room, or keep fewer with checkpoint.keep", status=1)
    assert not list((small_disk.folder / "full" / "checkpoints").glob("step-*[0-9]"))
    small_disk.resize("200m")
    result = runner.run("full", *settings)
    assert result.returncode == 0, result.stderr
    assert (small_disk.folder / "full" / "summary.json").exists()


def test_other_settings_under_the_same_name_and_a_finished_run(runner):
    first = runner.run("same")
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    for name in ("report.html", "sample.txt", "summary.json", "metrics.jsonl", "config.json", "tokenizer.json"):
        assert (runner.runs / "same" / name).stat().st_size > 0
    assert "gzip -9, each file by itself" in first.stdout
    assert "Traceback" not in first.stdout
    assert "Warning" not in first.stdout
    assert "DeepSpeed" not in first.stdout

    other = runner.run("same", "optim.lr=0.5", "seed=3")
    _refused(other, "other settings", "optim.lr was 0.01 and is now 0.5", "seed was 0 and is now 3", status=2)

    again = runner.run("same", "track.log_every=5")  # harmless: not another run
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout
    assert "gzip -9, each file by itself" in again.stdout


def test_text_from_the_run(runner):
    if not (runner.runs / "same" / "summary.json").exists():
        runner.run("same")
    command = [*runner.command("same")[:3], "generate", f"run={runner.runs / 'same'}", "generate.prompt=def f(x"]
    words = ["generate.max_tokens=8", "device=cpu"]
    result = subprocess.run(
        [*command, *words], env=runner.environment(), cwd=runner.folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def f(x")
    nowhere = subprocess.run(
        [*command[:4], "run=nowhere"], env=runner.environment(), cwd=runner.folder, capture_output=True, text=True
    )
    _refused(nowhere, "nowhere", "holds no checkpoint", status=1)
