"""Exports of random architectures: transformers has every key, gives our logits and routes, and back, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from small_run import TEXTS, export, same_tensors, write_run

from k2train.cli import main
from k2train.config import ModelConfig
from k2train.data import Tokenizer
from k2train.export import released_config
from k2train.model import Transformer

QUICK, MANY = range(8), range(8, 60)
KINDS = [pytest.param(seed, kind) for kind in ("mla", "gqa") for seed in QUICK] + [
    pytest.param(seed, kind, marks=pytest.mark.full) for kind in ("mla", "gqa") for seed in MANY
]


def load(folder: Path, **options: Any) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", output_loading_info=True, **options
    )
    assert not any(report.values()), report  # missing, unexpected, misshapen
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def chosen(model: Any, position: Callable[[Any], torch.Tensor], run: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """What a forward pass gives, and which experts each of its routers chose."""
    found: list[Any] = []
    gates = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    hooks = [g.register_forward_hook(lambda _g, _i, out: found.append(position(out).sort().values)) for g in gates]
    with torch.no_grad():
        result = run()
    for hook in hooks:
        hook.remove()
    return result, found


@pytest.mark.parametrize(("seed", "kind"), KINDS)
def test_there_and_back(seed: int, kind: str, tmp_path: Path, make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(seed, kind)
    model = write_run(tmp_path / "runs" / "a", config, seed=seed)
    folder = export(tmp_path / "runs" / "a", tmp_path / "hf", shard_bytes=20000)

    theirs = load(folder, dtype=torch.float32)
    tokens = torch.randint(config.vocab_size or 0, (2, 90), generator=torch.Generator().manual_seed(seed))
    logits, routes = chosen(model, lambda out: out[0], lambda: model.logits(tokens))
    expected, expected_routes = chosen(theirs, lambda out: out[2], lambda: theirs(input_ids=tokens).logits)
    assert (logits - expected).abs().max() <= 1e-4
    assert len(routes) == len(model.moe_layers())
    for route, wanted in zip(routes, expected_routes, strict=True):
        assert torch.equal(route, wanted)

    assert main(["import", str(folder), "name=b", f"runs_dir={tmp_path / 'runs'}"]) == 0
    same_tensors(tmp_path / "runs" / "b", model)
    again = export(tmp_path / "runs" / "b", tmp_path / "again", shard_bytes=20000)
    same_files(folder, again)


def same_files(one: Path, other: Path) -> None:
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names - {"README.md"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture
def mine(tmp_path: Path, make_config: Callable[..., ModelConfig]) -> tuple[Path, Transformer]:
    """A run with experts, YaRN and query latents."""
    config = dataclasses.replace(
        make_config(0, "mla"), num_hidden_layers=3, first_k_dense_replace=1, n_shared_experts=1
    )
    return tmp_path / "runs" / "mine", write_run(tmp_path / "runs" / "mine", config)


def test_weights_in_bf16_and_biases_in_fp32(mine: tuple[Path, Transformer], tmp_path: Path) -> None:
    run, model = mine
    folder = export(run, tmp_path / "hf", dtype="bf16", shard_bytes=30000)
    own = model.state_dict()
    for name, tensor in tensors(folder).items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16), name
    bias = "layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(tensors(folder)[f"model.{bias}"], own[bias])
    theirs = load(folder, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.model.layers[1].mlp.gate.e_score_correction_bias, own[bias])
    # Import of it is a run whose export is the same again.
    assert main(["import", str(folder), "name=b", f"runs_dir={tmp_path / 'runs'}"]) == 0
    same_files(folder, export(tmp_path / "runs" / "b", tmp_path / "again", dtype="bf16", shard_bytes=30000))


def test_shards_and_index(mine: tuple[Path, Transformer], tmp_path: Path) -> None:
    folder = export(mine[0], tmp_path / "hf", shard_bytes=30000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))
    ]
    sizes = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                assert index["weight_map"].pop(name) == file.name
                sizes.setdefault(file, []).append(opened.get_tensor(name).nbytes)
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert all(sum(each) <= 30000 or len(each) == 1 for each in sizes.values())


def test_the_tokenizer_gives_the_same_ids(mine: tuple[Path, Transformer], tmp_path: Path) -> None:
    folder = export(mine[0], tmp_path / "hf")
    own = Tokenizer((mine[0] / "tokenizer.json").read_text(), engine="tokenizers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "", " ", "  \n\n\tx", "Straße… 漢字 \x00 \U0001f600", "it's" * 50, "a  .", "<s>"]:
        assert theirs(text)["input_ids"] == own.encode(text), text
        assert theirs.decode(own.encode(text)) == text
    spelled = "a <|end_of_text|> b"
    assert theirs(spelled, split_special_tokens=True)["input_ids"] == own.encode(spelled)
    assert theirs.eos_token_id == theirs.bos_token_id == own.end_of_text
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == own.end_of_text


def test_it_ends_with_a_comparison(mine: tuple[Path, Transformer], tmp_path: Path, capsys: Any) -> None:
    export(mine[0], tmp_path / "a", compare="always", dtype="bf16")
    assert "DeepseekV3ForCausalLM of transformers" in (out := capsys.readouterr().out)
    assert "has every tensor, and its logits of 64 tokens differ by at most" in out
    export(mine[0], tmp_path / "b", compare="never")
    assert "not loaded with transformers: compare=never" in capsys.readouterr().out


def test_a_comparison_that_fails(mine: tuple[Path, Transformer], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def wrong(*arguments: Any, **keys: Any) -> dict[str, Any]:
        return released_config(*arguments, **keys) | {"routed_scaling_factor": 1.5}

    monkeypatch.setattr("k2train.export.write.released_config", wrong)
    assert main(["export", str(mine[0]), f"folder={tmp_path / 'a'}", "compare=always"]) == 1
    assert "which is more than rounding" in capsys.readouterr().err


def test_the_card(mine: tuple[Path, Transformer], tmp_path: Path) -> None:
    card = (export(mine[0], tmp_path / "hf") / "README.md").read_text()
    for part in (
        "| run | mine, step 20 of 20, seed 0 |",
        "12.0k tokens of text",
        "muonclip",
        "library_name: transformers",
    ):
        assert part in card


def test_where_it_goes(mine: tuple[Path, Transformer], tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(mine[0]), "compare=never"]) == 0
    folder = mine[0] / "export" / "step-00000020-bf16"
    assert (folder / "config.json").is_file()
    assert not list(mine[0].rglob("*.partial"))
    assert main(["export", str(mine[0]), "compare=never"]) == 1
    assert f"{folder} is there already" in capsys.readouterr().err


def test_what_cannot_be_exported(mine: tuple[Path, Transformer], tmp_path: Path, capsys: Any) -> None:
    def refused(run: Path, *words: str) -> str:
        assert main(["export", str(run), f"folder={tmp_path / 'no'}", *words]) == 1
        assert not list(tmp_path.glob("no*"))
        return str(capsys.readouterr().err)

    assert "holds no checkpoint" in refused(tmp_path)
    (tmp_path / "other.json").write_text((mine[0] / "tokenizer.json").read_text() + " ")
    assert "is not the tokenizer of" in refused(mine[0], f"tokenizer={tmp_path / 'other.json'}")
    assert "there is no tokenizer" in refused(mine[0], f"tokenizer={tmp_path / 'none.json'}")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"v_head_dim": 12}, "v_head_dim=12 is another size"),
        ({"qk_nope_head_dim": 2, "v_head_dim": 10, "qk_rope_head_dim": 8}, "Llama rotates all of a head"),
    ],
)
def test_grouped_queries_that_nobody_has(
    changes: dict[str, Any], reason: str, tmp_path: Path, make_config: Callable[..., ModelConfig], capsys: Any
) -> None:
    config = dataclasses.replace(make_config(0, "gqa"), num_hidden_layers=1, first_k_dense_replace=1)
    write_run(tmp_path / "run", dataclasses.replace(config, **{"qk_nope_head_dim": 0} | changes))
    assert main(["export", str(tmp_path / "run"), "compare=never"]) == 1
    assert reason in capsys.readouterr().err
