"""Releases of others as starting points: every tensor accounted for, 8-bit weights multiplied out, faults named."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import export, same_tensors, write_run

from k2train.checkpoint import choose_checkpoint
from k2train.cli import main
from k2train.config import ModelConfig
from k2train.data import Tokenizer
from k2train.export import own_place
from k2train.model import Transformer

Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture
def release(tmp_path: Path, make_config: Callable[..., ModelConfig]) -> tuple[Path, Transformer]:
    """A folder as others write it, of one file without an index, and the model in it."""
    config = dataclasses.replace(
        make_config(0, "mla"),
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_shared_experts=1,
        tie_word_embeddings=False,
    )
    model = write_run(tmp_path / "runs" / "a", config)
    folder = export(tmp_path / "runs" / "a", tmp_path / "hf")
    (folder / "model.safetensors.index.json").unlink()
    return folder, model


def edit(folder: Path, change: Change) -> None:
    """Changes the tensors of the folder."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def settings(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def take(folder: Path, name: str = "b") -> int:
    return main(["import", str(folder), f"name={name}", f"runs_dir={folder.parent / 'runs'}"])


def test_kimi_k2s_own_config(release: tuple[Path, Transformer], capsys: Any) -> None:
    folder, model = release
    settings(folder, model_type="kimi_k2", rope_parameters=None, dtype=None)
    assert take(folder) == 0
    assert "to train on from it: k2train train init_from=" in capsys.readouterr().out
    same_tensors(folder.parent / "runs" / "b", model)
    saved = choose_checkpoint(folder.parent / "runs" / "b").manifest.state["config"]["model"]
    assert saved == {**dataclasses.asdict(model.config), "initializer_scheme": "normal"}


def test_8_bit_weights_in_blocks(release: tuple[Path, Transformer]) -> None:
    folder, _ = release
    block, wanted = (8, 16), {}

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, weight in list(tensors.items()):
            if "_proj" in name:
                rows, columns = (-(-n // b) for n, b in zip(weight.shape, block, strict=True))
                scale = torch.rand(rows, columns, generator=generator) + 0.5
                eight = torch.randn(weight.shape, generator=generator).to(torch.float8_e4m3fn)
                tensors |= {name: eight, f"{name}_scale_inv": scale}
                wanted[name] = torch.stack(
                    [
                        torch.stack([eight[i, j].float() * scale[i // 8, j // 16] for j in range(weight.shape[1])])
                        for i in range(weight.shape[0])
                    ]
                )

    edit(folder, quantise)
    settings(folder, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)})
    assert take(folder) == 0
    reader = choose_checkpoint(folder.parent / "runs" / "b").reader
    for name, tensor in wanted.items():
        place = own_place(name)
        read = reader.read(place.name, "master")
        assert torch.equal(read if place.expert is None else read[place.expert], tensor), name


def test_further_predicted_tokens_are_left_out_and_said(release: tuple[Path, Transformer], capsys: Any) -> None:
    folder, model = release
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda t: t.update({"model.layers.2.eh_proj.weight": torch.ones(2), table: torch.ones(2)}))
    assert take(folder, "no") == 1  # config.json knows of no further layer
    assert "1 tensors left over: model.layers.2.eh_proj.weight" in capsys.readouterr().err
    settings(folder, num_nextn_predict_layers=1)
    assert take(folder) == 0
    assert "left out 1 tensors of layers that predict further tokens" in (out := capsys.readouterr().out)
    assert "left out 1 tensors of positions" in out
    same_tensors(folder.parent / "runs" / "b", model)


EXPERT = "model.layers.1.mlp.experts.1.up_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(EXPERT), f"1 tensors missing: {EXPERT}"),
        (
            lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"),
            "missing: model.layers.1.mlp.gate.e_score",
        ),
        (lambda t: t.update({NORM: torch.ones(3)}), f"1 tensors misshapen: {NORM} [3] for ["),
        (lambda t: t.update({"model.layers.0.bias": torch.ones(3)}), "1 tensors left over: model.layers.0.bias"),
        (lambda t: t.update({EXPERT: t[EXPERT].to(torch.int32)}), f"1 tensors of another type: {EXPERT} I32"),
        (
            lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}),
            f"{EXPERT} is fp8 and needs {EXPERT}_scale_inv",
        ),
    ],
)
def test_tensors_that_are_wrong_are_named(
    release: tuple[Path, Transformer], change: Change, sentence: str, capsys: Any
) -> None:
    edit(release[0], change)
    assert take(release[0]) == 1
    assert sentence in capsys.readouterr().err
    assert not (release[0].parent / "runs" / "b").exists()


INT4 = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quantization_config": INT4}, "quantised by compressed-tensors INT4"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe' is none of"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type='llama3'"),
        ({"num_experts_per_tok": 1000}, "num_experts_per_tok=1000 is more than"),
        ({"vocab_size": 299}, "does not hold the model"),
        ({"eos_token_id": 5}, "config.json ends a text with eos_token_id=5"),
        ({"kv_lora_rank": None}, "kv_lora_rank is null"),
    ],
)
def test_configs_that_are_not_ours(
    release: tuple[Path, Transformer], changes: dict[str, Any], sentence: str, capsys: Any
) -> None:
    settings(release[0], **changes)
    assert take(release[0]) == 1
    assert sentence in capsys.readouterr().err


def test_a_tokenizer_that_does_not_fit(release: tuple[Path, Transformer], capsys: Any) -> None:
    folder, _ = release
    (folder / "tokenizer_config.json").unlink()
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": 5000, "content": "<|far|>"})
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    assert take(folder) == 1
    assert "has ids up to 5000 and the model vocab_size=" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    assert take(folder) == 1
    assert "has neither tokenizer.json nor tiktoken.model" in capsys.readouterr().err


def test_a_tiktoken_file_as_kimi_k2_has_it(release: tuple[Path, Transformer]) -> None:
    folder, _ = release
    (folder / "tokenizer.json").unlink()
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the"]
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(ranks)]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines))
    names = {"[BOS]": 260, "[EOS]": 261, "<|im_end|>": 262}
    added = {str(number): {"content": name, "special": True} for name, number in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[EOS]", "added_tokens_decoder": added}))
    settings(folder, bos_token_id=260, eos_token_id=261)
    assert take(folder) == 0
    definition = (folder.parent / "runs" / "b" / "tokenizer.json").read_text()
    tokenizer = Tokenizer(definition, engine="tokenizers", end_of_text="[EOS]")
    assert tokenizer.end_of_text == 261
    assert tokenizer.encode("the the") == [257, 258]
    # And an export of it ends texts with the same token.
    again = export(folder.parent / "runs" / "b", folder.parent / "again")
    assert json.loads((again / "config.json").read_text())["eos_token_id"] == 261


def test_folders_that_are_no_model(release: tuple[Path, Transformer], capsys: Any) -> None:
    folder, _ = release
    assert take(folder.parent) == 1
    assert "config.json: it is not there" in capsys.readouterr().err
    assert main(["import", str(folder), "name=a", f"runs_dir={folder.parent / 'runs'}"]) == 1
    assert "is there already" in capsys.readouterr().err
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    assert take(folder) == 1
    assert "it was not copied whole" in capsys.readouterr().err
    path.unlink()
    assert take(folder) == 1
    assert "holds no *.safetensors" in capsys.readouterr().err
