"""Streaming, stop strings, penalties and batches; the cache gives the text that full passes give."""

import dataclasses
import json

import pytest
import torch
from small_run import export, write_run

from k2train.cli import main
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import ConfigError, GenerateConfig, RunConfig, parse
from k2train.data import Tokenizer
from k2train.generate import FullPasses, Remembering, TextStream, penalise, printable, sample_texts

PROMPTS = ["def read(", "", "The cat sat on the mat", "x"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A run's folder, its model with a context of 40 tokens, and its tokenizer."""
    torch.set_num_threads(1)
    config = parse(RunConfig, compose(TRAIN, ["experiment=tiny", "model.initializer_range=0.3"])).model
    config = dataclasses.replace(config, vocab_size=320, max_position_embeddings=64)
    root = tmp_path_factory.mktemp("spoken") / "run"
    model = write_run(root, config)
    return root, model, Tokenizer((root / "tokenizer.json").read_text(), engine="tokenizers")


def settings(**changes):
    usual = {"prompt": "", "max_tokens": 20, "temperature": 0.8, "top_p": 0.95, "seed": 3}
    return parse(GenerateConfig, usual | changes)


def texts(scores, tokenizer, prompts, config, first=0):
    found = [""] * len(prompts)
    for number, piece in sample_texts(scores, tokenizer, prompts, config, first=first):
        assert piece
        found[number] += piece
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_cache_gives_the_text_of_full_passes_alone_and_in_a_batch(spoken, temperature):
    _, model, tokenizer = spoken
    config = settings(temperature=temperature, repetition_penalty=1.3)
    full = texts(FullPasses(model, "cpu"), tokenizer, PROMPTS, config)
    assert texts(Remembering(model, max_tokens=20), tokenizer, PROMPTS, config) == full
    for number, prompt in enumerate(PROMPTS):
        alone = texts(Remembering(model, max_tokens=20), tokenizer, [prompt], config, first=number)
        assert alone == [full[number]]
    assert len(set(full)) == len(full)


def test_a_text_may_be_longer_than_the_context(spoken):
    _, model, tokenizer = spoken
    config = settings(max_tokens=150, temperature=1.0)
    scores = Remembering(model, max_tokens=150)
    (text,) = texts(scores, tokenizer, ["The cat " * 30], config)
    assert text
    assert texts(Remembering(model, max_tokens=150), tokenizer, ["The cat " * 30], config) == [text]


def test_what_is_scored_after_the_context_was_full_is_its_last_half(spoken):
    _, model, _ = spoken
    tokens = torch.randint(300, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    scores = Remembering(model, max_tokens=30)
    found = scores.begin([tokens[:60], tokens[:7]])
    for token in tokens[60:80]:
        found = scores.step([token, token])
    with torch.no_grad():
        kept = torch.tensor([tokens[32:80]])  # full at 64
        torch.testing.assert_close(found[0], model.logits(kept)[0, -1], atol=1e-4, rtol=1e-4)
        other = torch.tensor([tokens[:7] + tokens[60:80]])
        torch.testing.assert_close(found[1], model.logits(other)[0, -1], atol=1e-4, rtol=1e-4)


def test_characters_come_whole_and_stop_strings_not_at_all():
    stream = TextStream(["END", "\n\n"])
    data = "aé漢\nEN€E".encode()
    pieces = [stream.add(data[i : i + 1]) for i in range(len(data))]
    assert "".join(pieces) == "aé漢\nEN€"  # the last E may begin a stop string
    assert pieces[1:3] == ["", "é"]
    assert stream.add(b"N") == ""
    assert not stream.stopped
    assert stream.add(b"D and more") == ""
    assert stream.stopped
    assert TextStream(["x"]).add(b"abxcx") == "ab"
    assert TextStream([]).add(b"\xff\xc3") == "\ufffd"
    left = TextStream(["END"])
    assert left.add(b"a EN") == "a "
    assert left.add(b"", last=True) == "EN"


def test_a_stop_string_ends_one_text_and_not_the_others(spoken):
    _, model, tokenizer = spoken
    config = settings(max_tokens=30)
    free = texts(Remembering(model, max_tokens=30), tokenizer, PROMPTS, config)
    stop = free[0][4:7]
    found = texts(Remembering(model, max_tokens=30), tokenizer, PROMPTS, settings(max_tokens=30, stop=[stop]))
    for text, whole in zip(found, free, strict=True):
        assert text == whole.partition(stop)[0]
    with pytest.raises(ConfigError, match="stop holds an empty string"):
        settings(stop=["a", ""])


def test_a_penalty_makes_what_came_before_less_likely():
    logits_V = torch.tensor([2.0, -2.0, 1.0, 0.0])
    assert penalise(logits_V, [0, 1, 1, 3], penalty=2.0).tolist() == [1.0, -4.0, 1.0, 0.0]
    assert penalise(logits_V, [0], penalty=1.0) is logits_V


def write(capsys, *words):
    assert main(["generate", *map(str, words), "device=cpu", "generate.max_tokens=12"]) == 0
    return capsys.readouterr().out


def test_from_a_run_a_checkpoint_and_an_export(spoken, tmp_path, capsys):
    root, _, _ = spoken
    folder = export(root, tmp_path / "hf")
    capsys.readouterr()
    text = write(capsys, root, "generate.prompt=def read(")
    assert text.startswith("def read(")
    assert len(text) > 12
    for other in (root / "checkpoints" / "step-00000020", folder):
        assert write(capsys, other, "generate.prompt=def read(") == text
    assert write(capsys, root, "generate.prompt=def read(", "precision=bf16").startswith("def read(")


def test_prompts_of_a_file(spoken, tmp_path, capsys):
    root, _, _ = spoken
    (tmp_path / "a.txt").write_text("def read(\nx\nThe cat\n")
    lines = [json.loads(line) for line in write(capsys, root, f"prompts={tmp_path / 'a.txt'}").split("\n")[:-1]]
    assert [line["prompt"] for line in lines] == ["def read(", "x", "The cat"]
    shown = write(capsys, root, "generate.prompt=def read(").removesuffix("\n")
    assert printable(lines[0]["prompt"] + lines[0]["text"]) == shown
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": line["prompt"]}) for line in lines))
    again = write(capsys, root, f"prompts={tmp_path / 'a.jsonl'}", "batch_size=2")
    assert [json.loads(line) for line in again.split("\n")[:-1]] == lines
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert main(["generate", str(root), f"prompts={tmp_path / 'b.jsonl'}"]) == 2
    assert "b.jsonl: line 2 is not as" in capsys.readouterr().err
