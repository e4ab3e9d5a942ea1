"""The tokenizer of a run as transformers reads it, and that of a released model as ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2train.data import DataError, Tokenizer
from k2train.data.tokenizer import from_ranks
from k2train.export.architecture import ExportError

JSON, RANKS, SETTINGS = "tokenizer.json", "tiktoken.model", "tokenizer_config.json"


def tokenizer_files(definition: str, *, end_of_text: str, context: int) -> dict[str, str]:
    """Name and content of the files by which ``AutoTokenizer`` gives the ids that the model was trained on.

    Nothing is put before or behind a text. Text that spells a special token becomes that token, as is the custom there;
    ``split_special_tokens=True`` leaves it text, as in training.

    Args:
        definition: the ``tokenizer.json``.
        end_of_text: the special token that opens and closes each document.
        context: tokens that the model takes.
    """
    specials = {"bos_token": end_of_text, "eos_token": end_of_text, "pad_token": end_of_text}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **specials,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    return {
        JSON: definition,
        SETTINGS: json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(specials, indent=2, ensure_ascii=False) + "\n",
    }


def released_tokenizer(folder: Path, config: Mapping[str, Any]) -> tuple[str, Tokenizer, str]:
    """The ``tokenizer.json`` of a released model, the tokenizer that it is, and its token that ends a text.

    Args:
        folder: of the model; with a tokenizer.json, or as in Kimi K2's release a tiktoken.model and a
            tokenizer_config.json.
        config: its config.json.

    Raises:
        ExportError: there is none that k2train reads, or it does not fit the model.
    """
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8")) if (folder / SETTINGS).is_file() else {}
    named = settings.get("eos_token")
    name = named.get("content") if isinstance(named, dict) else named
    if (folder / JSON).is_file():
        path, definition = folder / JSON, (folder / JSON).read_text(encoding="utf-8")
    elif (folder / RANKS).is_file():
        path = folder / RANKS
        definition = from_ranks(path, path.read_bytes(), split="kimi-k2", end_of_text=name or "[EOS]")
    else:
        raise ExportError(f"{folder} has neither {JSON} nor {RANKS}: weights mean nothing without their tokenizer")
    specials = {token["id"]: token["content"] for token in json.loads(definition).get("added_tokens", [])}
    ends = config.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    end = next((specials[number] for number in ids if number in specials), None) if name is None else name
    if end is None:
        raise ExportError(
            f"{folder}: eos_token_id={ends} of config.json is no special token of {path.name}, and {SETTINGS} has none"
        )
    try:
        tokenizer = Tokenizer(definition, engine="tokenizers", end_of_text=end)
    except (DataError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: {error}") from error
    if tokenizer.vocab_size > config["vocab_size"]:
        raise ExportError(
            f"{path} has ids up to {tokenizer.vocab_size - 1} and the model vocab_size={config['vocab_size']}: they "
            "are not of one model"
        )
    if ids and tokenizer.end_of_text not in ids:
        raise ExportError(
            f"{folder}: config.json ends a text with eos_token_id={ends} and {SETTINGS} with {end!r}, which is "
            f"{tokenizer.end_of_text}: make them agree"
        )
    return definition, tokenizer, end
