import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import k2train
from k2train.config import TrackConfig
from k2train.train import track, track_wandb
from k2train.train.heat import CELL, picture
from k2train.train.track import build_tracker
from k2train.train.track_wandb import choose_mode, is_logged_in, run_id

ROOT = Path(__file__).parents[2]
RECORD = {
    "step": 1,
    "tokens": 4096,
    "loss": 3.2,
    "grad_norm": float("nan"),
    "applied": True,
    "max_logit": None,
    "seconds": {"step": 0.5, "data": None},
    "head_max_logit": {"layers.0": [1.0, 2.0, None], "layers.1": [3.0, 4.0, 2.0]},
}
INCIDENT = {
    "step": 4,
    "tokens": 16384,
    "incident": {"action": "skipped", "sentence": "the loss is not finite", "findings": [], "samples": [12, 16]},
}


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


def config(mode, *, tensorboard=False):
    plain = {"project": "p", "group": "sweep", "log_every": 1, "telemetry_every": 10, "spectrum_every": 0}
    return TrackConfig(wandb=mode, tensorboard=tensorboard, **plain)


def tracker(folder, mode, *, resumed_at=0, **more):
    said = []
    made = build_tracker(config(mode, **more), {"lr": 1}, folder=folder, name="my run", say=said.append)
    made.open(resumed_at=resumed_at)
    return made, said


class Fake:
    """In wandb's place: records what it is told, and fails or hangs where it is asked to."""

    def __init__(self, *, broken=(), hangs=()):
        self.broken, self.hangs, self.url = broken, hangs, "https://w/r"
        self.logged, self.alerts, self.options, self.finished = [], [], {}, None

    def _try(self, name):
        if name in self.broken:
            raise RuntimeError(f"{name} is broken\nand more")
        if name in self.hangs:
            threading.Event().wait()

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
        assert step_metric == {"*": "step", "by_tokens/*": "tokens"}[name]

    def log(self, values):
        self._try("log")
        self.logged.append(values)

    def alert(self, **values):
        self.alerts.append(values)

    def Table(self, *, columns, data):
        return [dict(zip(columns, row, strict=True)) for row in data]

    def Image(self, pixels, *, caption):
        return pixels.shape, caption

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
from k2train.train.track import build_tracker
config = TrackConfig(
    wandb="off", project="p", group=None, tensorboard=False, log_every=1, telemetry_every=10, spectrum_every=0
)
t = build_tracker(config, {}, folder=Path(sys.argv[1]), name="n", say=print)
t.open(resumed_at=0)
t.log({"step": 1, "tokens": 1, "loss": 1.0})
t.finish()
assert not {"wandb", "torch", "tensorboard"} & sys.modules.keys()
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}", "PATH": "/usr/bin:/bin"}
    found = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, env=environment)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert not list(folder.iterdir())


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
    (folder / "metrics.jsonl").write_text(f'{json.dumps(INCIDENT)}\n{json.dumps(INCIDENT | {"step": 9})}\n{{"incident')
    made, said = tracker(folder, "auto", resumed_at=5)
    assert said == ["wandb: online, at https://w/r"]
    assert (wandb.options["mode"], wandb.options["resume"], wandb.options["group"]) == ("online", "allow", "sweep")
    assert wandb.options["id"] == (folder / "wandb-id").read_text().strip()
    assert wandb.options["config"]["lr"] == 1
    assert wandb.options["config"]["code"]["version"] == k2train.__version__
    assert wandb.options["settings"].finish_timeout == track_wandb.FINISH_TIMEOUT
    made.log(RECORD)
    made.log(RECORD)  # at once: no second picture
    sets = {"validation": {"loss": 2.5}, "own": {"loss": 2.0}}
    made.validation({"step": 1, "tokens": 4096, "validation_loss": 3.3, "sets": sets})
    made.incident(INCIDENT | {"step": 7})
    made.finish(failed=True)
    at = {"step": 1, "tokens": 4096}
    numbers = {
        "train/loss": 3.2,
        "train/applied": True,
        "seconds/step": 0.5,
        "by_tokens/loss": 3.2,
    }
    picture = ((16, 24, 3), "from 1 to 4; a row for each layer")
    found = {"validation/loss": 3.3, "validation/validation/loss": 2.5, "validation/own/loss": 2.0}
    assert wandb.logged[:4] == [
        at | numbers,
        at | {"head_max_logit": picture},
        at | numbers,
        at | found | {"by_tokens/validation_loss": 3.3},
    ]
    assert [row["step"] for row in wandb.logged[4]["incidents"]] == [4, 7]  # not that of a step that is taken again
    assert wandb.logged[4]["incidents"][1]["last sample"] == 15
    (alert,) = wandb.alerts
    assert (alert["title"], alert["level"]) == ("step 7: the loss is not finite", "ERROR")
    assert wandb.finished == 1


def test_online_without_a_login_does_not_ask_for_one(folder, fake):
    wandb = fake()
    made, said = tracker(folder, "online")
    made.finish()
    assert "wandb login" in said[0]
    assert said[1].startswith("wandb: offline as there is no login")
    assert said[1].endswith(f"wandb sync {folder / 'wandb'}/offline-run-*")
    assert wandb.options["mode"] == "offline"


def test_a_server_out_of_reach_means_offline(folder, fake, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    wandb = fake(broken=("online",))
    made, said = tracker(folder, "auto")
    assert said == [
        "wandb: no connection to the server (RuntimeError: online is broken)",
        f"wandb: offline; to upload the run later: wandb sync {folder / 'wandb'}/offline-run-*",
    ]
    assert wandb.torn_down
    made.log(RECORD)
    made.finish()
    assert len(wandb.logged) == 2


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_broken_tracker_is_said_once_and_ends_nothing(folder, fake, broken):
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


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_holds_nothing_up(folder, fake, monkeypatch, where):
    monkeypatch.setattr(track, "OPENING", 0.1)
    monkeypatch.setattr(track, "CLOSING", 0.1)
    monkeypatch.setattr(track, "PENDING", 20)
    fake(hangs=(where,))
    made, said = tracker(folder, "offline")
    begin = time.monotonic()
    for _ in range(100):
        made.validation({"step": 1, "tokens": 1, "validation_loss": 1.0, "sets": {}})
        time.sleep(0.001)
    made.finish()
    assert time.monotonic() - begin < 5  # of a thread that is never let go
    (failure,) = [text for text in said if "failed" in text]
    assert ("it has not ended in" if where == "finish" else "no longer keeps up") in failure


def test_a_missing_wandb_ends_nothing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    made, said = tracker(folder, "offline")
    made.log(RECORD)
    made.finish()
    assert len(said) == 1
    assert "wandb failed" in said[0]


def test_a_picture_has_a_cell_for_each_number():
    pixels, low, high = picture([[1.0, 2.0], [3.0, float("nan")], [4.0]])
    assert pixels.shape == (3 * CELL, 2 * CELL, 3)
    assert (low, high) == (1.0, 4.0)
    assert pixels[0, 0].tolist() == [48, 18, 110]
    assert pixels[-1, 0].tolist() == [253, 231, 37]
    assert pixels[CELL, -1].tolist() == pixels[-1, -1].tolist() == [200, 200, 200]
    assert picture([[5.0, 5.0]])[0][0, 0].tolist() == [33, 144, 141]


def test_tensorboard_gets_numbers_maps_and_incidents(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made, said = tracker(folder, "off", tensorboard=True)
    made.log(RECORD)
    made.incident(INCIDENT)
    made.finish()
    again, _ = tracker(folder, "off", tensorboard=True, resumed_at=1)
    again.log(RECORD | {"step": 2, "tokens": 8192})
    again.finish()
    assert said == [f"tensorboard: to look at it, tensorboard --logdir {folder / 'tensorboard'}"]
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 4)) for event in found.Scalars("train/loss")] == [(1, 3.2), (2, 3.2)]
    assert [event.step for event in found.Scalars("by_tokens/loss")] == [4096, 8192]
    assert [image.step for image in found.Images("head_max_logit")] == [1, 2]
    assert {"incidents/text_summary", "config/text_summary"} <= set(found.Tags()["tensors"])
