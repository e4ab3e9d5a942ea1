import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.data.tokenizer import END_OF_TEXT, ENGINES, Tokenizer, choose_engine, train_bpe

SOURCE = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (json, json.decoder))
DEFINITION = train_bpe([SOURCE], vocab_size=400)
FAST, REFERENCE = (Tokenizer(DEFINITION, engine=engine) for engine in ENGINES)

ODD_TEXTS = {
    "empty": "",
    "emoji": "a 😀👩‍👩‍👧 é e\u0301 ßẞ ǆ",
    "line ends": "a\r\nb\n\rc\r\r\n  \n\t d",
    "special token": f"x{END_OF_TEXT}y <|im_end|> {END_OF_TEXT}",
    "rare blanks": "a\u00a0b\u0085c\u2028d\u200be\u180ef\ufeffg\u3000",
    "digits": "1 12 123 1234 12345 ٣٤٥ ½",
    "long word": "a" * 200_000,
    "long rule": "=" * 200_000,
    "long line": "word " * 50_000,
    "blanks by the hundred thousand": " " * 400_000 + "x" + " \t" * 200_000,
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_both_engines_agree_and_decoding_gives_the_text_back(name):
    text = ODD_TEXTS[name]
    ids = FAST.encode(text)
    assert ids == REFERENCE.encode(text)
    assert FAST.decode_bytes(ids) == text.encode()
    assert FAST.decode(ids) == text
    assert FAST.end_of_text not in ids


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(text):
    ids = FAST.encode(text)
    assert ids == REFERENCE.encode(text)
    assert FAST.decode(ids) == text


def test_training_is_deterministic_and_ids_are_in_their_places():
    assert train_bpe([SOURCE], vocab_size=400) == DEFINITION
    assert FAST.vocab_size == 400
    assert FAST.end_of_text == 0
    assert sorted(FAST.decode_bytes([token]) for token in range(1, 257)) == [bytes([byte]) for byte in range(256)]
    assert len(FAST.encode(SOURCE)) < len(SOURCE) / 1.5


def test_hugging_face_reads_the_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(DEFINITION, encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs(SOURCE)["input_ids"] == FAST.encode(SOURCE)
    assert theirs.decode(FAST.encode(SOURCE), clean_up_tokenization_spaces=False) == SOURCE


def test_bytes_alone_are_a_vocabulary_and_less_is_refused():
    smallest = Tokenizer(train_bpe(["abab"], vocab_size=257), engine="tiktoken")
    assert smallest.vocab_size == 257
    assert smallest.decode(smallest.encode("abab é")) == "abab é"
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        train_bpe(["abab"], vocab_size=256)


def test_a_text_with_few_pairs_ends_with_a_smaller_vocabulary():
    small = Tokenizer(train_bpe(["abab abab"], vocab_size=5000), engine="tiktoken")
    assert 257 < small.vocab_size < 270


def test_another_id_by_the_fast_engine_chooses_the_reference(monkeypatch):
    assert choose_engine(DEFINITION, ["some text", SOURCE[:1000]]).engine == "tiktoken"
    real = tokenizers.Tokenizer.from_str(DEFINITION)
    changed = json.loads(real.to_str())
    changed["model"]["merges"] = []  # tiktoken merges by vocabulary, tokenizers by this list
    assert choose_engine(json.dumps(changed), ["some text", SOURCE[:1000]]).engine == "tokenizers"


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="engine='sentencepiece' is unknown"):
        Tokenizer(DEFINITION, engine="sentencepiece")


def test_a_sample_that_stops_inside_a_character_still_decodes():
    ids = FAST.encode("😀")
    assert len(ids) > 1
    assert FAST.decode(ids[:-1]) == "\ufffd"


@pytest.mark.parametrize("token", [-1, 400])
def test_an_id_of_the_padding_is_no_token(token):
    with pytest.raises(ValueError, match=f"token {token} is none of the tokenizer's 400"):
        FAST.decode([5, token])


def test_forking_after_training_says_nothing_and_works():
    code = (
        "import os\n"
        "from k2train.data.tokenizer import train_bpe\n"
        "texts = ['some text ' * 100] * 50\n"
        "train_bpe(texts, vocab_size=300)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    train_bpe(texts, vocab_size=300)\n"
        "    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout + done.stderr == "0\n"
