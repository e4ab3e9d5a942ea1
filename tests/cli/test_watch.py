import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from made_runs import incident, make_run, step, validation

from k2train.cli import main, watch
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose

ROOT = Path(__file__).parents[2]


def made(folder, records, **options):
    run = make_run(folder, records, **options)
    (run / "config.json").write_text(json.dumps(compose(TRAIN, [f"name={folder.name}", "schedule.steps=100"])))
    return run


def test_a_finished_run_is_shown_and_left(tmp_path, capsys):
    folder = made(tmp_path / "r", [step(99), validation(100), step(100, skipped_steps=1)], torn="{\n", status=0)
    assert main(["watch", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 100/100 | 410k tokens | loss 3.0100")
    assert "step 100: 1 step was not applied" in lines
    assert lines[-2:] == ["1 damaged line left out", "r: finished"]


@pytest.mark.parametrize(("status", "words"), [(143, "r: ended with status 143"), (None, "r: died without a word")])
def test_it_says_how_a_run_ended(tmp_path, capsys, status, words):
    assert main(["watch", str(made(tmp_path / "r", [step(1)], status=status))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == words


def test_no_run_is_one_sentence(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "none")]) == 1
    assert "is no run: there is no such folder" in capsys.readouterr().err


def test_it_follows_a_run_that_goes_on_and_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "EVERY", 0.01)
    folder = made(tmp_path / "r", [step(1)])
    stream = io.StringIO()

    def until(text):
        deadline = time.monotonic() + 20
        while text not in stream.getvalue():
            assert time.monotonic() < deadline, stream.getvalue()
            time.sleep(0.01)

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        follower = threading.Thread(target=watch.watch, args=(folder, stream), daemon=True)
        follower.start()
        until("step   1/100")
        with open(folder / "metrics.jsonl", "a") as file:
            line = json.dumps(step(4, skipped_steps=1)) + "\n"
            file.write(line[:20])
            file.flush()
            time.sleep(0.1)
            file.write(line[20:] + json.dumps(validation(4)) + "\n")
        until("step 4: held out")
        os.replace(made(tmp_path / "again", [step(1), step(2, loss=9.0)]) / "metrics.jsonl", folder / "metrics.jsonl")
        until("step   2/100")
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(incident(3, "the loss is 7.9")) + "\n")
        until("step 3: the loss is 7.9")
        (folder / "exit_status").write_text("0\n")
    follower.join(timeout=20)
    lines = stream.getvalue().splitlines()
    assert [match[1] for line in lines if (match := re.match(r"step +(\d+)/100", line))] == ["1", "4", "2"]
    assert lines[-1] == "r: finished"
    assert "damaged" not in stream.getvalue()


def test_ctrl_c_leaves_without_a_word(tmp_path):
    folder = made(tmp_path / "r", [step(1)])
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "k2train", "watch", str(folder)]
        follower = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert follower.stdout.readline().startswith("step   1/100")
        follower.send_signal(signal.SIGINT)
        out, err = follower.communicate(timeout=20)
    assert (follower.returncode, out, err) == (0, "", "")
