"""The model card: what was trained, on what, and how to use it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import k2train
from k2train.config import ModelConfig, RunConfig
from k2train.units import count, duration


def model_card(
    config: RunConfig,
    model: ModelConfig,
    state: Mapping[str, Any],
    *,
    step: int,
    steps: int,
    parameters: int,
    dtype: str,
) -> str:
    """README.md of an exported model.

    Args:
        config: of the run.
        model: the architecture as it was trained.
        state: of the checkpoint.
        step: of the checkpoint.
        steps: of the whole run.
        parameters: how many numbers are trained.
        dtype: of the weights.
    """
    data, progress = state.get("data", {}), state.get("progress", {})
    sources = [f"{count(tokens)} tokens of {name}" for name, tokens in data.get("tokens", {}).items()]
    experts = (
        f"{model.n_routed_experts} experts of which {model.num_experts_per_tok} a token, "
        f"{model.n_shared_experts} shared"
        if model.has_experts
        else "none"
    )
    scaling = model.rope_scaling
    yarn = "" if scaling is None else f", YaRN x{scaling.factor:g} of {scaling.original_max_position_embeddings}"
    rows = {
        "parameters": count(parameters),
        "layers": f"{model.num_hidden_layers} of width {model.hidden_size}",
        "attention": f"{model.attention}, {model.num_attention_heads} heads",
        "experts": experts,
        "vocabulary": f"{model.vocab_size}",
        "context": f"{model.max_position_embeddings}{yarn}",
        "weights": dtype,
        "run": f"{config.name}, step {step} of {steps}, seed {config.seed}",
        "training time": duration(progress.get("elapsed", math.nan)),
        "optimizer": f"{config.optim.name}, peak learning rate {config.optim.lr:g}",
        "data": ", ".join(sources) or ", ".join(config.data.sources) or "not known",
        "data set": data.get("dataset", "not known"),
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {config.name}

A language model that was trained from scratch with k2train {k2train.__version__}. It continues text; it has not been
taught to follow instructions, and nobody has tested what it says.

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokens = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))
```
"""
