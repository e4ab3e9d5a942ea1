"""wandb's own file of an offline run holds every metric, picture, table and alert, under one id over two starts."""

import json
import os
import socket
import struct
import sys
from collections import Counter
from pathlib import Path

import pytest

from k2train.config import TrackConfig
from k2train.train.track import build_tracker

BLOCK, HEADER = 2**15, 7
RECORD = {
    "step": 1,
    "tokens": 4096,
    "loss": 3.2,
    "utilisation": 0.4,
    "seconds": {"step": 0.5, "data": 0.1},
    "layer_grad_norm": {"layers.0": 1.5},
    "head_max_logit": {"layers.0": [1.0, 2.0], "layers.1": [3.0, 4.0]},
    "expert_load": {"layers.1": [1.0, 0.5, 1.5]},
}
VALIDATION = {"step": 2, "tokens": 8192, "validation_loss": 3.3, "validation_bits_per_byte": 1.6, "sets": {}}
INCIDENT = {
    "step": 2,
    "tokens": 8192,
    "incident": {"action": "logged", "sentence": "the loss is 9", "samples": [8, 16]},
}
WARNING = {"step": 3, "tokens": 9000, "incident": {"action": "warned", "sentence": "the loss is flat"}}


def stored(path: Path):
    """The records of a ``.wandb`` file: a seven-byte head, then LevelDB's log format, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little of the block is left for a head
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def history(records) -> list[dict]:
    """The rows that were logged."""
    found = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_the_file_of_an_offline_run_has_all_and_a_resumed_run_is_the_same(folder, capfd):
    plain = {"group": "g", "tensorboard": False, "log_every": 1, "telemetry_every": 10, "spectrum_every": 0}
    config, said = TrackConfig(wandb="auto", project="p", **plain), []
    for resumed_at in (0, 2):
        made = build_tracker(config, {"lr": 0.5}, folder=folder, name="my run", say=said.append)
        made.open(resumed_at=resumed_at)
        made.log(RECORD | {"step": resumed_at + 1})
        made.validation(VALIDATION)
        made.incident(INCIDENT)
        made.warning(WARNING)
        made.finish()
    sys.modules["wandb"].teardown()  # waits for its process, which may write the last records after finish
    assert capfd.readouterr() == ("", "")
    command = f"wandb sync {folder / 'wandb'}/offline-run-*"
    assert said == [f"wandb: offline as there is no login; to upload the run later: {command}"] * 2

    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    starts = [list(stored(path)) for path in files]
    for records, step in zip(starts, (1, 3), strict=True):
        kinds = Counter(record.WhichOneof("record_type") for record in records)
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert run.run_id == (folder / "wandb-id").read_text().strip()
        assert (run.project, run.run_group, run.display_name) == ("p", "g", "my run")
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["lr"] == 0.5
        assert settings["code"].keys() >= {"version"}
        axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
        assert axes.items() >= {"*": "step", "by_tokens/*": "tokens"}.items()

        rows = history(records)
        assert all({"step", "tokens"} <= row.keys() for row in rows)
        found = {key: value for row in rows for key, value in row.items()}
        numbers = {"train/loss": 3.2, "train/utilisation": 0.4, "seconds/step": 0.5, "seconds/data": 0.1}
        numbers |= {"layer_grad_norm/layers.0": 1.5, "validation/loss": 3.3, "validation/bits_per_byte": 1.6}
        numbers |= {"by_tokens/loss": 3.2, "by_tokens/validation_loss": 3.3, "by_tokens/validation_bits_per_byte": 1.6}
        assert found.items() >= numbers.items()
        assert rows[0]["step"] == step
        for name, size in (("head_max_logit", (16, 16)), ("expert_load", (24, 8))):
            assert [found[f"{name}/{key}"] for key in ("_type", "width", "height")] == ["image-file", *size]
        assert (found["incidents/_type"], found["incidents/nrows"]) == ("table-file", 2)
        alerts = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
        assert [alert.title for alert in alerts] == ["step 2: the loss is 9", "step 3: the loss is flat"]
        assert kinds["exit"] == 1
