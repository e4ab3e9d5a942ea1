import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from k2train.config import TrackConfig
from k2train.train import track
from k2train.train.track import Tracker, choose_mode, is_logged_in, run_id

ROOT = Path(__file__).parents[2]
RECORD = {"step": 1, "tokens": 4096, "loss": 3.2, "grad_norm": float("nan"), "applied": True, "max_logit": None}


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my run"
    path.mkdir()
    return path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def tracker(folder, mode, *, resumed=False):
    said = []
    config = TrackConfig(wandb=mode, project="p", log_every=1)
    made = Tracker(config, {"lr": 1}, folder=folder, name="my run", say=said.append)
    made.open(resumed=resumed)
    return made, said


class Fake:
    """In wandb's place: records what it is told, and fails where it is asked to."""

    def __init__(self, *, broken=()):
        self.broken, self.logged, self.options, self.finished, self.url = broken, [], {}, None, "https://w/r"

    def _try(self, name):
        if name in self.broken:
            raise RuntimeError(f"{name} is broken\nand more")

    def Settings(self, **options):
        return SimpleNamespace(**options)

    def init(self, **options):
        self._try("init")
        self._try(options["mode"])
        self.options = options
        return self

    def teardown(self):
        self.torn_down = True

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self._try("log")
        self.logged.append(values)

    def finish(self, exit_code):
        self._try("finish")
        self.finished = exit_code


@pytest.fixture
def fake(monkeypatch):
    def install(**options):
        made = Fake(**options)
        monkeypatch.setitem(sys.modules, "wandb", made)
        return made

    return install


def test_auto_is_offline_without_a_login_and_online_with_one(monkeypatch, tmp_path, no_network):
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("auto") == "off"
    assert [choose_mode(mode) for mode in ("off", "offline", "online")] == ["off", "offline", "online"]


def test_a_login_is_looked_for_in_netrc(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert is_logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not is_logged_in()
    (tmp_path / "netrc").write_text("this is no netrc")
    assert not is_logged_in()


def test_off_does_not_import_wandb(folder):
    script = """
import sys
from pathlib import Path
from k2train.config import TrackConfig
from k2train.train.track import Tracker
config = TrackConfig(wandb="off", project="p", log_every=1)
t = Tracker(config, {}, folder=Path(sys.argv[1]), name="n", say=print)
t.open(resumed=False)
t.log({"step": 1, "tokens": 1, "loss": 1.0})
t.finish()
assert "wandb" not in sys.modules and "torch" not in sys.modules
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}", "PATH": "/usr/bin:/bin"}
    found = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, env=environment)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert not list(folder.iterdir())


def test_offline_for_real_and_in_silence(folder, no_network, capfd):
    made, said = tracker(folder, "auto")
    made.log(RECORD)
    made.validation({"step": 1, "tokens": 4096, "validation_loss": 3.3, "validation_bits_per_byte": 1.6, "sets": {}})
    made.finish()
    sys.modules["wandb"].teardown()  # waits for its process, which may write the last records after finish
    assert said == [f"wandb: offline as there is no login, in {folder / 'wandb'}; nothing is uploaded"]
    (stored,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    assert b"bits_per_byte" in stored.read_bytes()
    assert capfd.readouterr() == ("", "")


def test_the_id_stays_on_resume_and_is_new_for_a_new_run(folder):
    first = run_id(folder, resumed=False)
    assert first.startswith("my-run-")
    assert run_id(folder, resumed=True) == first
    assert run_id(folder, resumed=False) != first
    (folder / "wandb-id").unlink()
    assert run_id(folder, resumed=True) != first


def test_online(folder, fake, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    wandb = fake()
    made, said = tracker(folder, "auto", resumed=True)
    assert said == ["wandb: online, at https://w/r"]
    assert (wandb.options["mode"], wandb.options["resume"]) == ("online", "allow")
    assert wandb.options["id"] == (folder / "wandb-id").read_text().strip()
    assert wandb.options["settings"].finish_timeout == track.FINISH_TIMEOUT
    made.log(RECORD)
    sets = {"validation": {"loss": 2.5}, "own": {"loss": 2.0}}
    made.validation({"step": 1, "tokens": 4096, "validation_loss": 3.3, "sets": sets})
    assert wandb.logged == [
        {"step": 1, "tokens": 4096, "train/loss": 3.2, "train/applied": True},
        {
            "step": 1,
            "tokens": 4096,
            "validation/loss": 3.3,
            "validation/validation/loss": 2.5,
            "validation/own/loss": 2.0,
        },
    ]
    made.finish(failed=True)
    assert wandb.finished == 1


def test_online_without_a_login_does_not_ask_for_one(folder, fake):
    wandb = fake()
    _, said = tracker(folder, "online")
    assert "wandb login" in said[0]
    assert said[1].startswith("wandb: offline as there is no login")
    assert wandb.options["mode"] == "offline"


def test_a_server_out_of_reach_means_offline(folder, fake, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    wandb = fake(broken=("online",))
    made, said = tracker(folder, "auto")
    assert said == [
        "wandb: no connection to the server (RuntimeError: online is broken)",
        f"wandb: offline, in {folder / 'wandb'}; nothing is uploaded",
    ]
    assert wandb.torn_down
    made.log(RECORD)
    assert len(wandb.logged) == 1


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_broken_wandb_is_said_once_and_ends_nothing(folder, fake, broken):
    fake(broken=(broken,))
    made, said = tracker(folder, "offline")
    for _ in range(3):
        made.log(RECORD)
    made.finish()
    made.finish()
    failures = [text for text in said if "failed" in text]
    assert failures == [
        f"wandb failed and is left out from here on; metrics.jsonl goes on (RuntimeError: {broken} is broken)"
    ]


def test_a_missing_wandb_ends_nothing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    made, said = tracker(folder, "offline")
    made.log(RECORD)
    made.finish()
    assert len(said) == 1
    assert "wandb failed" in said[0]
