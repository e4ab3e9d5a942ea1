import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import yaml

from k2train.config import DataConfig, parse, to_dict
from k2train.data import DataError, open_dataset, prepare
from k2train.data.preparation import encode
from k2train.data.sources import files
from k2train.paths import config_dir

MODULE = importlib.import_module("k2train.data.preparation.pipeline")


def silent(stage: str, done: int, total: int) -> None:
    assert 0 <= done <= total
    assert total > 0
    del stage


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_progress_tells_each_stage_to_its_end(corpus, make_config, tmp_path):
    calls = []
    prepare(make_config(), cache=tmp_path / "cache", progress=lambda *call: calls.append(call))
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["read", "tokenizer", "encode"]
    for stage in stages:
        done = [call[1] for call in calls if call[0] == stage]
        assert done == sorted(done)
        assert [call[2] for call in calls if call[0] == stage][-1] == done[-1]


def test_a_second_time_nothing_is_read(corpus, make_config, tmp_path, monkeypatch):
    first = prepare(make_config(), cache=tmp_path / "cache", progress=silent)
    monkeypatch.setattr(files, "read_text", lambda path: pytest.fail("it was read"))
    calls = []
    assert prepare(make_config(), cache=tmp_path / "cache", progress=lambda *call: calls.append(call)) == first
    assert calls == []


def test_the_cache_follows_what_the_data_depend_on(corpus, make_config, tmp_path):
    cache = tmp_path / "cache"

    def made(**changes) -> Path:
        return prepare(make_config(**changes), cache=cache, progress=silent)

    first = made()
    fingerprint = open_dataset(first).fingerprint
    others = [made(held_out=0.4), made(source={"exclude": ["top0*"]}), made(tokenizer={"vocab_size": 300})]
    assert len({first, *others}) == 4
    assert len({fingerprint, *(open_dataset(other).fingerprint for other in others)}) == 4
    assert made(cache_dir=str(tmp_path / "elsewhere")) == first  # where it is kept is not what it is

    os.utime(corpus / "top0.txt", ns=(1, 1))
    touched = made()
    assert touched != first
    assert open_dataset(touched).fingerprint == fingerprint  # the text is the same

    text = (corpus / "top0.txt").read_bytes()
    (corpus / "top0.txt").write_bytes(text.replace(b"alpha", b"ALPHA"))
    assert open_dataset(made()).fingerprint != fingerprint


def test_the_same_text_elsewhere_is_the_same_data(corpus, make_config, tmp_path):
    first = prepare(make_config(), cache=tmp_path / "cache", progress=silent)
    shutil.copytree(corpus, tmp_path / "moved")
    second = prepare(make_config(path=str(tmp_path / "moved")), cache=tmp_path / "other", progress=silent)
    assert content(first.parent) == content(second.parent)


def test_odd_files_are_left_out_and_counted(corpus, make_config, tmp_path):
    (corpus / "empty.txt").write_bytes(b"")
    (corpus / "program.bin").write_bytes(b"\x7fELF\0\0")
    (corpus / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (corpus / "copy.txt").write_bytes((corpus / "top0.txt").read_bytes())
    (corpus / "broken").symlink_to("nowhere")
    dataset = open_dataset(prepare(make_config(), cache=tmp_path / "cache", progress=silent))
    assert len({origin for split in ("train", "held_out") for origin, _ in dataset.documents(split)}) == 12
    assert list(dataset.manifest["about"]["skipped"]["folder"].values()) == [1, 1, 1, 1, 1]
    (note,) = dataset.notes()
    assert note.startswith("folder: documents left out: 1 (no permission, a broken link")
    assert "1 (not UTF-8)" in note


def test_text_that_looks_like_the_special_token_stays_text(corpus, make_config, tmp_path):
    (corpus / "tricky.txt").write_text("one<|end_of_text|>two " * 20)
    dataset = open_dataset(prepare(make_config(), cache=tmp_path / "cache", progress=silent))
    documents = dict([*dataset.documents("train"), *dataset.documents("held_out")])
    assert documents["tricky.txt"] == b"one<|end_of_text|>two " * 20
    assert len(documents) == 13


def test_a_vocabulary_that_ends_early_is_said_and_padded_from_its_real_size(tmp_path, make_config):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("a", "b"):
        (corpus / f"{name}.txt").write_text(f"{name} tiny tiny text")
    config = make_config(tokenizer={"vocab_size": 4096, "pad_to_multiple": 64})
    dataset = open_dataset(prepare(config, cache=tmp_path / "cache", progress=silent))
    size = dataset.tokenizer.vocab_size
    assert 257 < size < 320
    assert dataset.padded_vocab_size == 320
    assert dataset.notes() == [
        f"the vocabulary ended at {size} of 4096 tokens, as the training text has no more pairs to merge"
    ]


def test_too_little_text_is_refused(tmp_path, make_config):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"the source folder has no text \(skipped: 1 empty\): give files"):
        prepare(make_config(), cache=tmp_path / "cache", progress=silent)
    (corpus / "alone.txt").write_text("some text")
    with pytest.raises(DataError, match=r"at least two groups \(directories, or files side by side\)"):
        prepare(make_config(), cache=tmp_path / "cache", progress=silent)


def test_a_cache_below_a_file_is_one_clear_sentence(corpus, make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="a part of the path is a file, not a folder"):
        prepare(make_config(), cache=tmp_path / "file" / "cache", progress=silent)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EACCES, "there is no permission"),
        (errno.EROFS, "the file system is read-only"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "train-00000.safetensors", "blocks.safetensors", "manifest.json"])
def test_a_refused_write_is_one_clear_sentence_and_can_be_taken_up(
    corpus, make_config, tmp_path, monkeypatch, code, sentence, name
):
    whole = prepare(make_config(), cache=tmp_path / "whole", progress=silent)
    replace = os.replace

    def refuse(aside, path) -> None:
        if Path(path).name == name:
            raise OSError(code, os.strerror(code))
        replace(aside, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(DataError, match=f"^{tmp_path / 'cache'}: {sentence}"):
            prepare(make_config(), cache=tmp_path / "cache", progress=silent)
    again = prepare(make_config(), cache=tmp_path / "cache", progress=silent)
    assert content(again.parent) == content(whole.parent)


def test_a_corpus_that_changes_meanwhile_is_refused(corpus, make_config, tmp_path):
    def meddle(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("read", total):
            for path in corpus.glob("top*"):
                path.write_text("other")

    with pytest.raises(DataError, match="was changed while it was being read: run again"):
        prepare(make_config(), cache=tmp_path / "cache", progress=meddle)
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def test_interrupted_anywhere_it_comes_to_the_same(corpus, make_config, tmp_path):
    calls = []
    whole = prepare(make_config(shard_bytes=3000), cache=tmp_path / "whole", progress=lambda *call: calls.append(call))

    def interrupt_at(call: int):
        left = iter(range(call))

        def progress(*_) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        return progress

    interrupted = 0
    for call in range(0, len(calls), 3):
        # A run that finds shards of the one before has less to report, and may come to its end.
        try:
            again = prepare(make_config(shard_bytes=3000), cache=tmp_path / "cache", progress=interrupt_at(call))
        except KeyboardInterrupt:
            assert not list((tmp_path / "cache").rglob("manifest.json"))
            interrupted += 1
        else:
            break
    assert interrupted > len(calls) // 6
    assert content(again.parent) == content(whole.parent)


def test_shards_that_are_whole_are_kept(corpus, make_config, tmp_path, monkeypatch):
    whole = prepare(make_config(shard_bytes=3000), cache=tmp_path / "cache", progress=silent)
    expected = content(whole.parent)
    whole.unlink()
    damaged = whole.parent / "folder" / "train-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    written = []
    write_shard = encode.write_shard

    def recorded(path, *args, **options):
        written.append(path)
        return write_shard(path, *args, **options)

    monkeypatch.setattr(encode, "write_shard", recorded)
    again = prepare(make_config(shard_bytes=3000), cache=tmp_path / "cache", progress=silent)
    assert content(again.parent) == expected
    assert [path for path in written if path.name.startswith("train")] == [damaged]


def test_killed_it_comes_to_the_same(corpus, make_config, tmp_path):
    whole = prepare(make_config(), cache=tmp_path / "whole", progress=silent)
    code = """
import json, os, signal, sys
from pathlib import Path
from k2train.config import DataConfig, parse
from k2train.data import prepare, shards
def progress(stage, done, total):
    pass
def killed(path, data):
    (path.parent / f".{path.name}.aside").write_bytes(data[:100])  # what a writer that dies half-way leaves
    os.kill(os.getpid(), signal.SIGKILL)
shards.atomic_write = killed
prepare(parse(DataConfig, json.loads(sys.argv[1])), cache=Path(sys.argv[2]), progress=progress)
"""

    config = json.dumps(to_dict(make_config()))
    done = subprocess.run([sys.executable, "-c", code, config, str(tmp_path / "cache")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "cache").rglob("*.aside"))
    again = prepare(make_config(), cache=tmp_path / "cache", progress=silent)
    assert content(again.parent) == content(whole.parent)


def test_two_at_once_make_it_once(corpus, make_config, tmp_path):
    stages: list[list[str]] = [[], []]
    paths: list[Path] = []
    first_is_at_work, second_has_waited = threading.Event(), threading.Event()

    def first(stage: str, done: int, total: int) -> None:
        stages[0].append(stage)
        first_is_at_work.set()
        assert second_has_waited.wait(60)

    def second(stage: str, done: int, total: int) -> None:
        stages[1].append(stage)
        second_has_waited.set()

    threads = []
    for progress in (first, second):
        threads.append(
            threading.Thread(
                target=lambda told=progress: paths.append(
                    prepare(make_config(), cache=tmp_path / "cache", progress=told)
                )
            )
        )
        threads[-1].start()
        assert first_is_at_work.wait(60)
    for thread in threads:
        thread.join()
    assert set(stages[1]) == {"wait"}
    assert paths[0] == paths[1]
    open_dataset(paths[0])


def test_a_damaged_shard_is_made_anew_once_the_folder_is_deleted(corpus, make_config, tmp_path):
    path = prepare(make_config(), cache=tmp_path / "cache", progress=silent)
    fingerprint = open_dataset(path).fingerprint
    (path.parent / "folder" / "train-00000.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=f"delete the folder {path.parent} and prepare the data again"):
        list(open_dataset(path).documents("train"))
    shutil.rmtree(path.parent)
    assert open_dataset(prepare(make_config(), cache=tmp_path / "cache", progress=silent)).fingerprint == fingerprint


def test_a_tokenizer_that_is_none_is_refused_before_the_text_is_read(corpus, make_config, tmp_path):
    path, stages = tmp_path / "tiktoken.model", []
    path.write_text("no ranks at all")
    config = make_config(tokenizer={"kind": "tiktoken", "path": str(path)})
    with pytest.raises(DataError, match=r"tiktoken.model is no tiktoken file"):
        prepare(config, cache=tmp_path, progress=lambda stage, done, total: stages.append(stage))
    assert not stages


def test_the_tokenizer_learns_from_at_most_so_much_text(corpus, make_config, tmp_path, monkeypatch):
    whole = prepare(make_config(), cache=tmp_path / "whole", progress=silent)
    monkeypatch.setattr(MODULE, "TRAINING_BYTES", 2000)
    part = prepare(make_config(), cache=tmp_path / "part", progress=silent)
    assert open_dataset(part).fingerprint != open_dataset(whole).fingerprint


def test_the_whole_standard_library_comes_back_and_five_percent_of_it_are_held_out(tmp_path):
    values = yaml.safe_load((config_dir() / "data" / "stdlib.yaml").read_text())
    values["tokenizer"]["vocab_size"] = 512
    dataset = open_dataset(prepare(parse(DataConfig, values), cache=tmp_path, progress=silent))
    for split in ("train", "held_out"):
        for origin, text in dataset.documents(split):
            assert text == (Path(sysconfig.get_path("stdlib")) / origin).read_bytes(), origin
    held_out, train = dataset.bytes("held_out"), dataset.bytes("train")
    assert 0.045 < held_out / (held_out + train) <= 0.05


def test_who_waits_is_told_only_while_the_other_gets_on(tmp_path):
    waits: list[str] = []
    with MODULE._alone(tmp_path / "lock", silent) as touching:
        other = threading.Thread(
            target=lambda: MODULE._alone(tmp_path / "lock", lambda *call: waits.append(call[0])).__enter__(),
            daemon=True,
        )
        other.start()
        time.sleep(1)
        assert waits == ["wait"]  # five looks, and nothing went on
        for _ in range(5):
            touching("read", 1, 1)
            time.sleep(0.3)
        assert len(waits) > 3
    other.join(5)
