"""Folders of runs as training leaves them, made up."""

import json
import math
from pathlib import Path


def step(number, **changes):
    plain = {
        "step": number,
        "steps": 1,
        "skipped_steps": 0,
        "phase": "training",
        "tokens": 4096 * number,
        "loss": 3.0 + 1 / number,
        "bits_per_byte": 1.5,
        "lr": 0.01,
        "grad_norm": 0.4,
        "max_logit": 20.0,
        "clipped_heads": 0,
        "balance_max": 1.3,
        "tokens_per_second": 12_345.6,
        "elapsed": number / 2,
    }
    return plain | changes


def telemetry(number):
    """Of 3 layers with 4 heads, 2 of them with 8 experts."""
    layers, moe = [f"layers.{n}" for n in range(3)], ["layers.1", "layers.2"]
    clip = 0.9 if number > 800 else 1.0
    return {
        "head_max_logit": {layer: [20 + k + number / 50 for k in range(4)] for layer in layers},
        "head_max_logit_exact": {layer: [1] * 4 for layer in layers},
        "head_clip": {layer: [1.0, 1.0, clip, 1.0] for layer in layers},
        "head_scale": {layer: [1.0, 1.0, clip, 1.0] for layer in layers},
        "layer_grad_norm": dict.fromkeys(["embed_tokens", *layers, "lm_head"], 0.1 + 1 / number),
        "layer_update_rms": dict.fromkeys(layers, 0.2),
        "layer_weight_rms": dict.fromkeys(layers, 0.02 + number / 100000.0),
        "expert_load": {layer: [0.6 + k / 10 for k in range(8)] for layer in moe},
        "expert_max_violation": dict.fromkeys(moe, 0.3),
        "expert_dead": dict.fromkeys(moe, 0.0),
        "expert_entropy": dict.fromkeys(moe, 0.98),
        "source_tokens": {"code": 3 * number, "text": number},
        "seconds": {"step": 0.5, "data": 0.01, "forward_backward": 0.35, "update": 0.1},
        "utilisation": 0.4,
        "memory": 2**30,
    }


def validation(number, **changes):
    loss = 3.1 + 1 / number
    plain = {
        "step": number,
        "tokens": 4096 * number,
        "validation_loss": loss,
        "validation_bits_per_byte": loss / 2,
        "sets": {"held_out": {"loss": loss, "bits_per_byte": loss / 2}},
        "whole": False,
    }
    return plain | changes


def incident(number, sentence):
    found = {"action": "logged", "sentence": sentence, "findings": [{"signal": "loss", "value": 7.9}]}
    return {"step": number, "tokens": 4096 * number, "incident": found}


def make_run(folder: Path, records, *, torn="", samples=(), incidents=None, summary=None, status=None, **settings):
    """Writes a run; ``incidents`` is {folder: {file: content}}."""
    folder.mkdir(parents=True)
    optim = {"name": "muonclip", "tau": 100.0, "lr": settings.pop("lr", 0.01)}
    config = {"name": folder.name, "optim": optim, "seed": 0} | settings
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + torn)
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    for name, files in (incidents or {}).items():
        (folder / "incidents" / name).mkdir(parents=True)
        for file, content in files.items():
            (folder / "incidents" / name / f"{file}.json").write_text(json.dumps(content))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if status is not None:
        (folder / "exit_status").write_text(f"{status}\n")
    return folder


def long_run(folder: Path, *, steps=1000, spike_at=700, **changes):
    """A run with all that a report shows."""
    hostile = "<script>document.title = 'broken'</script> </pre> <img src=http://192.0.2.1/x.png onerror=alert(1)>"
    records = []
    for n in range(1, steps + 1):
        heads = [[20 + 5 * layer + head + n / 50 for head in range(4)] for layer in range(3)]
        loss = 3 + 5 * math.exp(-8 * n / steps) + (4 if n == spike_at else 0)
        records.append(
            step(
                n,
                loss=loss,
                bits_per_byte=loss / 2,
                grad_norm=0.4 + 20 * (n == spike_at),
                max_logit=20 + n / 10,
                clipped_heads=max(0, n - 800) // 50,
                skipped_steps=int(n == steps // 2),
                heads=heads,
                tokens_of={"code": n * 3, "text": n},
                **(telemetry(n) if n % 10 == 0 else {}),
            )
        )
        if n % 100 == 0:
            sets = {"code": {"loss": loss, "bits_per_byte": 1.4}, "text": {"loss": loss + 1, "bits_per_byte": 1.6}}
            records.append(validation(n, sets=sets))
    return make_run(
        folder,
        records,
        samples=[{"step": n, "text": f"{hostile} at {n}"} for n in range(100, steps + 1, 100)],
        incidents={
            str(spike_at): {
                "incident": incident(spike_at, hostile),
                "documents": {"documents": [{"origin": "a.py", "text": hostile}]},
            }
        },
        **changes,
    )
