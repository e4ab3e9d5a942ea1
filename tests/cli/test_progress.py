import io

from k2train.cli.progress import STAGES, PrepareProgress


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_line_a_stage_where_there_is_no_terminal():
    stream = io.StringIO()
    with PrepareProgress(stream) as progress:
        for stage in ("read", "tokenizer", "encode"):
            for done in range(5):
                progress(stage, done, 5)
    assert stream.getvalue().splitlines() == [
        "preparing the data: reading the text",
        "preparing the data: making the tokenizer",
        "preparing the data: encoding the text",
    ]


def test_bars_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Screen()
    with PrepareProgress(stream) as progress:
        progress("read", 5, 5)
        progress("encode", 1, 5)
    assert STAGES["read"] in stream.getvalue()
    assert STAGES["encode"] in stream.getvalue()
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is back


def test_nothing_from_other_ranks_or_when_nothing_is_to_be_done():
    stream = Screen()
    with PrepareProgress(stream, enabled=False) as progress:
        progress("read", 1, 5)
    with PrepareProgress(stream):
        pass
    assert stream.getvalue() == ""
