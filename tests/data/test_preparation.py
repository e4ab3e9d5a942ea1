"""What comes out depends on the text and the settings alone: not on workers, kills or how often it was started."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from k2train.config import DataConfig, parse, to_dict
from k2train.data import DataError, open_dataset, prepare
from k2train.data.preparation import verdicts
from k2train.paths import config_dir

ROOT = Path(__file__).parents[2]
WORDS = ["alpha", "beta", "gamma", "delta", "return", "value", "naïve", "数据", "😀", "x1", "y2", "lorem", "ipsum"]
PREPARE = """
import json, sys
from pathlib import Path
from k2train.config import DataConfig, parse
from k2train.data import prepare
if __name__ == "__main__":
    prepare(parse(DataConfig, json.loads(sys.argv[1])), cache=Path(sys.argv[2]), progress=lambda *call: None)
"""


def silent(stage: str, done: int, total: int) -> None:
    del stage, done, total


def write_folder(root: Path, *, files: int, words: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    for number in range(files):
        path = root / f"part{number % 7}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(rng.choices(WORDS, k=rng.randrange(1, 2 * words))))


def write_lines(path: Path, *, rows: int, words: int, seed: int = 1) -> None:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 2 * words))) for _ in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"body": text, "id": f"doc-{n}"}) + "\n" for n, text in enumerate(texts)))


def two_sources(tmp_path: Path, **changes) -> DataConfig:
    values = yaml.safe_load((config_dir() / "data" / "mixture.yaml").read_text())
    values["sources"] = {
        "web": {"kind": "jsonl", "path": str(tmp_path / "web"), "text": "body", "origin": "id"},
        "code": {"kind": "folder", "path": str(tmp_path / "code")},
    }
    values |= {"weights": {}, "held_out": 0.1, "shard_bytes": 8000, "workers": 1} | changes
    values["tokenizer"]["vocab_size"] = 400
    return parse(DataConfig, values)


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    write_folder(tmp_path / "code", files=60, words=60)
    write_lines(tmp_path / "web" / "a.jsonl", rows=150, words=50)
    return tmp_path


def content(manifest: Path) -> dict[str, bytes]:
    files = (path for path in manifest.parent.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(manifest.parent)): path.read_bytes() for path in files}


def test_two_sources_of_different_kinds_in_one_data_set(mixture):
    dataset = open_dataset(prepare(two_sources(mixture), cache=mixture / "cache", progress=silent))
    assert dataset.sources == ("code", "web")
    found = {
        name: {split: dict(dataset.documents(split, name)) for split in ("train", "held_out")}
        for name in dataset.sources
    }
    lines = [json.loads(line) for line in (mixture / "web" / "a.jsonl").read_text().splitlines()]
    assert found["web"]["train"] | found["web"]["held_out"] == {line["id"]: line["body"].encode() for line in lines}
    files = {str(p.relative_to(mixture / "code")): p.read_bytes() for p in (mixture / "code").rglob("*.txt")}
    assert found["code"]["train"] | found["code"]["held_out"] == files
    for name in dataset.sources:
        assert found[name]["train"]
        assert found[name]["held_out"]
        sizes = {split: sum(map(len, texts.values())) for split, texts in found[name].items()}
        assert 0.05 < sizes["held_out"] / sum(sizes.values()) < 0.16  # the smallest of seven folders
        assert len(dataset.manifest["sources"][name]["splits"]["train"]["shards"]["file"]) > 2
        assert len(dataset.manifest["sources"][name]["splits"]["held_out"]["shards"]["file"]) == 1
    assert dataset.tokens("train") == dataset.tokens("train", "web") + dataset.tokens("train", "code")


def test_processes_change_nothing(mixture):
    made = [
        content(prepare(two_sources(mixture, workers=workers), cache=mixture / f"cache{workers}", progress=silent))
        for workers in (1, 3)
    ]
    assert made[0] == made[1]


def test_equal_documents_of_two_sources_are_kept_once(mixture):
    text = (mixture / "code" / "part0" / "0.txt").read_text()
    with (mixture / "web" / "a.jsonl").open("a") as file:
        file.write(json.dumps({"body": text, "id": "copy"}) + "\n")
    dataset = open_dataset(prepare(two_sources(mixture), cache=mixture / "cache", progress=silent))
    assert dataset.manifest["about"]["skipped"]["web"] == {"byte for byte a copy of an earlier one": 1}
    both = open_dataset(prepare(two_sources(mixture, dedup="none"), cache=mixture / "cache", progress=silent))
    origins = {origin for split in ("train", "held_out") for origin, _ in both.documents(split, "web")}
    assert "copy" in origins


def test_near_copies_are_left_out(tmp_path):
    pytest.importorskip("datasketch")
    rng = random.Random(5)
    words = [f"w{number}" for number in range(1000)]
    texts = [rng.choices(words, k=300) for _ in range(12)]
    near = [[*text[:150], "changed", *text[151:]] for text in texts[:4]]
    far = [[*text[:100], *rng.choices(words, k=200)] for text in texts[4:8]]
    (tmp_path / "web").mkdir()
    rows = [{"body": " ".join(text), "id": str(n)} for n, text in enumerate([*texts, *near, *far])]
    (tmp_path / "web" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_folder(tmp_path / "code", files=4, words=5)
    dataset = open_dataset(prepare(two_sources(tmp_path, dedup="near"), cache=tmp_path / "cache", progress=silent))
    origins = {origin for split in ("train", "held_out") for origin, _ in dataset.documents(split, "web")}
    assert origins == {str(n) for n in range(20)} - {"12", "13", "14", "15"}
    assert dataset.manifest["about"]["skipped"]["web"] == {"nearly a copy of an earlier one": 4}


def test_verdicts_do_not_depend_on_how_much_is_held_in_memory(mixture, monkeypatch):
    whole = content(prepare(two_sources(mixture), cache=mixture / "whole", progress=silent))
    monkeypatch.setattr(verdicts, "AT_ONCE", 16)
    assert content(prepare(two_sources(mixture), cache=mixture / "parts", progress=silent)) == whole


def kill_at_random(mixture: Path, *, kills: int, workers: int, seconds: float, rng: random.Random) -> None:
    config = json.dumps(to_dict(two_sources(mixture, workers=workers)))
    cache, script = mixture / f"cache{workers}", mixture / "script.py"
    script.write_text(PREPARE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}", "OMP_NUM_THREADS": "1"}
    done = 0
    while done < kills and not list(cache.rglob("manifest.json")):
        process = subprocess.Popen([sys.executable, str(script), config, str(cache)], env=environment)
        time.sleep(rng.uniform(0.1, seconds))
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        done += process.wait() == -signal.SIGKILL
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive, "workers outlive the process that they work for"
    prepare(two_sources(mixture, workers=workers), cache=cache, progress=silent)


def test_killed_at_random_points_it_comes_to_the_same(mixture):
    expected = content(prepare(two_sources(mixture), cache=mixture / "whole", progress=silent))
    for workers in (1, 2):
        kill_at_random(mixture, kills=2, workers=workers, seconds=2, rng=random.Random(workers))
        (manifest,) = (mixture / f"cache{workers}").rglob("manifest.json")
        assert content(manifest) == expected


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_killed_at_twenty_random_points_it_comes_to_the_same(tmp_path, workers):
    write_folder(tmp_path / "code", files=600, words=2000)
    write_lines(tmp_path / "web" / "a.jsonl", rows=3000, words=600)
    expected = content(prepare(two_sources(tmp_path), cache=tmp_path / "whole", progress=silent))
    kill_at_random(tmp_path, kills=20, workers=workers, seconds=6, rng=random.Random(workers))
    (manifest,) = (tmp_path / f"cache{workers}").rglob("manifest.json")
    assert content(manifest) == expected


def peak_memory(folder: Path, config: DataConfig) -> int:
    """Bytes of a process that prepares; getrusage would count what the process that starts it holds."""
    script = folder / "script.py"
    script.write_text(f"{PREPARE}    print(Path('/proc/self/status').read_text())\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), json.dumps(to_dict(config)), str(folder / "cache")]
    status = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.full
def test_memory_does_not_grow_with_the_text(tmp_path):
    peaks = []
    write_folder(tmp_path / "code", files=10, words=100)
    for rows in (2_000, 40_000):
        write_lines(tmp_path / "web" / "a.jsonl", rows=rows, words=400)  # 5 and 100 MB
        settings = to_dict(two_sources(tmp_path, shard_bytes=1_000_000))
        settings["tokenizer"]["kind"] = "bytes"
        peaks.append(peak_memory(tmp_path, parse(DataConfig, settings)))
    assert (tmp_path / "web" / "a.jsonl").stat().st_size > 80_000_000
    assert peaks[1] - peaks[0] < 30_000_000


def test_ids_from_elsewhere_are_taken_as_they_are_and_another_tokenizer_is_refused(tmp_path):
    write_folder(tmp_path / "code", files=30, words=30)
    write_lines(tmp_path / "web" / "a.jsonl", rows=30, words=30)
    first = open_dataset(prepare(two_sources(tmp_path), cache=tmp_path / "cache", progress=silent))
    tokens = first.stream("train", "code").read(0, first.tokens("train", "code")).astype("<u2")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.bin").write_bytes(tokens.tobytes())
    values = to_dict(two_sources(tmp_path))
    values["sources"] = {
        "raw": {"kind": "raw", "path": str(tmp_path / "raw"), "separator": first.tokenizer.end_of_text}
    }
    values["tokenizer"] |= {"kind": "json", "path": str(first.folder / "tokenizer.json")}
    again = open_dataset(prepare(parse(DataConfig, values), cache=tmp_path / "cache", progress=silent))
    texts = sorted(text for split in ("train", "held_out") for _, text in again.documents(split))
    assert texts == sorted(text for _, text in first.documents("train", "code"))
    assert again.bytes("train") + again.bytes("held_out") == first.bytes("train", "code")
    (tmp_path / "raw" / "a.bin").write_bytes(np.array([5, 4000, 0, 6, 7, 0], "<u2").tobytes())
    with pytest.raises(DataError, match=r"a.bin#\d has the id 4000 and the tokenizer has \d+ ids: it is not"):
        prepare(parse(DataConfig, values), cache=tmp_path / "cache", progress=silent)


def test_nothing_at_all_is_refused(tmp_path):
    write_folder(tmp_path / "code", files=30, words=30)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the source web has no documents"):
        prepare(two_sources(tmp_path), cache=tmp_path / "cache", progress=silent)
