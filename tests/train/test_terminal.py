import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from k2train.train.terminal import Terminal

ROOT = Path(__file__).parents[2]


def record(step, **changes):
    plain = {
        "step": step,
        "tokens": 4096 * step,
        "loss": 3.25,
        "bits_per_byte": 1.5,
        "lr": 0.008,
        "grad_norm": 0.41,
        "max_logit": 23.4,
        "clipped_heads": 2,
        "tokens_per_second": 12_345.0,
        "utilisation": 0.412,
        "seconds": {"step": 2.0, "data": 0.1, "communication": 0.3},
        "expert_max_violation": {"layers.1": 0.2, "layers.2": 0.3},
    }
    return plain | changes


def validation(step):
    return {"step": step, "validation_loss": 3.3, "validation_bits_per_byte": 1.6, "sets": {}, "whole": False}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def plain(steps=100, log_every=10, **options):
    stream, clock = io.StringIO(), Clock()
    return Terminal(name="n", steps=steps, log_every=log_every, stream=stream, clock=clock, **options), stream, clock


def test_plain_lines_come_at_the_first_the_last_and_every_nth_step():
    terminal, stream, clock = plain(steps=25)
    with terminal:
        for step in range(1, 26):
            clock.now += 2.0
            terminal.log(record(step))
    lines = stream.getvalue().splitlines()
    assert [re.match(r"step +(\d+)/25", line)[1] for line in lines] == ["1", "10", "20", "25"]
    assert "\x1b" not in stream.getvalue()
    assert (
        "loss 3.2500 | 1.5000 bits/byte | lr 8.00e-03 | grad norm 0.41 | max logit 23.4 | clipped heads 2" in lines[0]
    )
    assert lines[0].endswith("12.3k tokens/s")  # nothing is known of the time left
    assert lines[1].endswith("2.05k tokens/s | 30s left")  # 15 steps of 2 s


def test_a_resumed_run_begins_with_a_line():
    terminal, stream, _ = plain()
    terminal.log(record(43))
    terminal.log(record(44))
    assert [line.split("/")[0].split()[1] for line in stream.getvalue().splitlines()] == ["43"]


def test_validation_and_sentences_are_lines():
    terminal, stream, _ = plain()
    terminal.say("a [bold]path[/bold] " + "x" * 200)
    terminal.validation(validation(50))
    assert stream.getvalue() == (
        "a [bold]path[/bold] " + "x" * 200 + "\nstep 50: held out 1.6000 bits/byte (loss 3.3000)\n"
    )
    sets = {name: {"loss": 3.0, "bits_per_byte": bits} for name, bits in (("code", 1.25), ("prose", 2.0))}
    terminal.validation(validation(60) | {"sets": sets})
    assert stream.getvalue().endswith("(loss 3.3000): code 1.2500, prose 2.0000\n")
    terminal.validation(validation(70) | {"next_line_accuracy": 0.456, "valid_syntax": None})
    assert stream.getvalue().endswith("(loss 3.3000); next line 0.46; syntax -\n")


def test_numbers_that_are_none_do_not_end_the_run():
    terminal, stream, _ = plain()
    terminal.log(record(1, loss=float("nan"), bits_per_byte=None, grad_norm=float("inf"), max_logit=float("-inf")))
    assert "loss - | - bits/byte" in stream.getvalue()
    assert "grad norm - | max logit -" in stream.getvalue()


def test_forced_colour_does_not_make_a_terminal_of_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with open(tmp_path / "out", "w") as stream, Terminal(name="n", steps=2, log_every=1, stream=stream) as terminal:
        terminal.log(record(1))
    assert (tmp_path / "out").read_text().startswith("step 1/2 |")


def test_other_ranks_say_nothing():
    terminal, stream, _ = plain(enabled=False)
    with terminal:
        terminal.say("x")
        terminal.log(record(1))
        terminal.validation(validation(1))
    assert stream.getvalue() == ""


# ---- on a terminal

LIVE = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/train"]
from pathlib import Path
from k2train.train.quiet import quiet
from k2train.train.terminal import Terminal
from test_terminal import Clock, record, validation
clock, end = Clock(), sys.argv[2]
stream = quiet(Path(sys.argv[3]), rank=0, world_size=1).out
with Terminal(name="quickstart", steps=1200, log_every=10, stream=stream, clock=clock) as terminal:
    for step in range(1, 41):
        clock.now += 0.05
        terminal.log(record(step))
        print("noise")
        if step == 20:
            terminal.say("a sentence")
            terminal.validation(validation(step))
            found = {"action": "skipped", "sentence": "the loss is not finite"}
            terminal.incident({"step": step + 1, "incident": found})
    if end == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def on_a_terminal(tmp_path):
    """Runs the script on a terminal of its own, with its output kept to the log as in a real run."""
    return lambda end, **options: run_on_a_terminal(end, tmp_path / "rank-0.log", **options)


def run_on_a_terminal(end, log, *, columns=80, term="xterm"):
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE, str(ROOT), end, str(log)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={"TERM": term, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    process.communicate()
    return seen.decode()


def text_of(screen):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen).replace("\r", "")


def test_the_panel_shows_everything_within_eighty_columns(on_a_terminal):
    screen = on_a_terminal("end")
    panel = text_of(screen).rpartition("╭")[2]
    assert max(map(len, f"╭{panel}".splitlines())) <= 80
    for text in (
        "quickstart",
        "step 40/1,200",
        "58s left",
        "loss",
        "3.2500",
        "bits/byte",
        "1.5000",
        "held out",
        "1.6000",
    ):
        assert text in panel
    for text in ("tokens", "164k", "81.9k", "8.00e-03", "max logit", "23.4", "clipped heads", "grad norm", "0.41"):
        assert text in panel
    for text in ("of peak", "41.2%", "waiting", "20.0%", "violation", "0.30"):
        assert text in panel
    assert re.search(r"│ loss ▁+ +│", panel)
    assert "│ step 21: the loss is not finite, so nothing was updated " in panel
    assert "a sentence\n" in text_of(screen)
    assert "step 20: held out 1.6000 bits/byte (loss 3.3000)\n" in text_of(screen)
    assert "noise" not in screen
    assert text_of(screen).count("╭") < 20  # 40 steps within 2 s, five drawings a second


@pytest.mark.parametrize("end", ["end", "interrupt", "kill"])
def test_the_cursor_is_visible_however_it_ends(on_a_terminal, end):
    screen = on_a_terminal(end)
    assert screen.rfind("\x1b[?25h") > screen.rfind("\x1b[?25l") >= 0


def test_a_narrow_terminal_is_no_error(on_a_terminal):
    panel = text_of(on_a_terminal("end", columns=30)).rpartition("╭")[2]
    assert max(map(len, f"╭{panel}".splitlines())) == 30


def test_a_dumb_terminal_gets_plain_lines(on_a_terminal):
    screen = on_a_terminal("end", term="dumb")
    assert "\x1b" not in screen
    assert "step    40/1,200 |" in screen
