"""Tokenizers that come as files, and the ids of the fast engine on ten thousand documents."""

import base64
import dataclasses
import json
import random
from pathlib import Path

import pytest
import tiktoken
import tokenizers
import yaml

from k2train.config import TokenizerConfig, parse
from k2train.data import DataError
from k2train.data.tokenizer import ENGINES, SPLITS, Tokenizer, choose_engine, define, train_bpe
from k2train.paths import config_dir

PIECES = [
    *("def ", "return", " the", "The", "iPhone", "HTTPServer", "don't", "WE'LL", "naïve", "Straße", "ǅ", "数据处理"),
    *(
        "日本語",
        "한국어",
        "ру\u0301сский",
        "हिन्दी",
        "ع",
        "😀",
        "👩\u200d👩\u200d👧",
        "é",
        "e\u0301",
        "\r\n",
        "\n\n",
        "\t",
    ),
    *("   ", " ", "\u00a0", "\u200b", "12345", "٣٤٥", "½", "...", "==", "\n    ", "\ufeff", "中a文B", "x" * 40),
    *("<|end_of_text|>", "<|im_end|>", "[EOS]"),
]


def documents(count: int) -> list[str]:
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randrange(30))) for _ in range(count - 3)]
    return [*texts, "", "word and more " * 75_000, "\r\n" * 5000]


@pytest.fixture(scope="module", params=sorted(SPLITS))
def definition(request) -> str:
    return train_bpe(documents(300), vocab_size=600, split=request.param)


def test_ids_are_those_of_tokenizers_on_ten_thousand_documents(definition):
    fast = Tokenizer(definition, engine=ENGINES[0])
    theirs = tokenizers.Tokenizer.from_str(definition)
    theirs.encode_special_tokens = True
    texts = documents(10_000)
    assert max(map(len, texts)) > 1_000_000
    assert choose_engine(definition, texts[:100]).engine == "tiktoken"
    for text in texts:
        ids = fast.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert fast.decode_bytes(ids) == text.encode()


def settings(**changes) -> TokenizerConfig:
    values = yaml.safe_load((config_dir() / "data" / "folder.yaml").read_text())["tokenizer"]
    return parse(TokenizerConfig, values | changes)


def ranks_of(definition: str) -> dict[bytes, int]:
    """A ranks file's content: the 256 bytes and what they merge to, from 0 on."""
    tokenizer = Tokenizer(definition, engine="tokenizers")
    return {tokenizer.decode_bytes([token]): token - 1 for token in range(1, tokenizer.vocab_size)}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.full)])
def test_a_ranks_file_gives_the_ids_of_tiktoken(tmp_path, count):
    """Of the form of Kimi K2's tiktoken.model and tokenizer_config.json, with its split."""
    definition = train_bpe(documents(300), vocab_size=900, split="kimi-k2")
    ranks = ranks_of(definition)
    write_ranks(tmp_path / "tiktoken.model", ranks)
    names = {len(ranks): "[BOS]", len(ranks) + 1: "[EOS]", len(ranks) + 255: "[PAD]"}
    added = {str(number): {"content": name, "special": True} for number, name in names.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    config = settings(kind="tiktoken", path=str(tmp_path / "tiktoken.model"), split="kimi-k2", end_of_text="[EOS]")
    made = define(config, [])
    tokenizer = Tokenizer(made, engine="tiktoken", end_of_text="[EOS]")
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (len(ranks) + 1, len(ranks) + 256)
    theirs = tiktoken.Encoding("theirs", pat_str=SPLITS["kimi-k2"], mergeable_ranks=ranks, special_tokens={})
    texts = documents(count)
    assert choose_engine(made, texts, end_of_text="[EOS]").engine == "tiktoken"
    for text in texts:
        assert tokenizer.encode(text) == theirs.encode_ordinary(text)


def test_k2_keeps_chinese_apart_and_cuts_where_a_capital_follows():
    encoding = tiktoken.Encoding(
        "bytes", pat_str=SPLITS["kimi-k2"], mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    pre = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLITS["kimi-k2"]), "isolated")
    for text, parts in {
        "abc中文def": ["abc", "中文", "def"],
        "iPhone don't WE'LL": ["i", "Phone", " don't", " WE'LL"],
        "HTTPServer12345": ["HTTPServer", "123", "45"],
        "x = 1\r\n  y": ["x", " =", " ", "1", "\r\n", " ", " y"],
    }.items():
        assert [part for part, _ in pre.pre_tokenize_str(text)] == parts
        assert encoding.decode(encoding.encode(text)) == text


def test_a_ranks_file_alone_closes_documents_with_the_first_free_id(tmp_path):
    write_ranks(tmp_path / "ranks", {bytes([byte]): byte for byte in range(256)})
    made = define(settings(kind="tiktoken", path=str(tmp_path / "ranks")), [])
    assert Tokenizer(made, engine="tiktoken").end_of_text == 256
    (tmp_path / "ranks").write_text("not base64!")
    with pytest.raises(DataError, match="ranks is no tiktoken file, which has lines of base64 and rank"):
        define(settings(kind="tiktoken", path=str(tmp_path / "ranks")), [])


def test_bytes_alone():
    tokenizer = Tokenizer(define(settings(kind="bytes"), ["ignored ignored"]), engine="tiktoken")
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode("naïve 😀")) == len("naïve 😀".encode())


def test_gpt2s_kind_of_tokenizer_is_read_and_encoded_fast(tmp_path):
    theirs = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    theirs.train_from_iterator(documents(200), vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    config = settings(kind="json", path=str(tmp_path / "tokenizer.json"), end_of_text="<|endoftext|>")
    made = define(config, [])
    assert choose_engine(made, documents(500), end_of_text="<|endoftext|>").engine == "tiktoken"
    with pytest.raises(DataError, match=r"no special token '\[EOS\]': set data.tokenizer.end_of_text to one of"):
        define(dataclasses.replace(config, end_of_text="[EOS]"), [])


def test_what_tiktoken_cannot_do_is_left_to_tokenizers(definition):
    parsed = json.loads(definition)
    assert choose_engine(definition, []).engine == "tiktoken"
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"added_tokens": [parsed["added_tokens"][0] | {"special": False}]},
    ):
        assert choose_engine(json.dumps(parsed | change), []).engine == "tokenizers"


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in (tokenizers.Tokenizer(tokenizers.models.WordPiece()).to_str(), "{}", "no json", "[]"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"tokenizer.json: it"):
            define(settings(kind="json", path=str(path)), [])
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer.json: it does not exist"):
        define(settings(kind="json", path=str(path)), [])
