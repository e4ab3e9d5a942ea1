"""A checkpoint of two processes, and its export, score what training told; lm-evaluation-harness scores the export."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from k2train.cli.trained import load_trained
from k2train.comm import World


def call(runner, *words):
    environment = runner.environment() | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(runner.folder / "hf-home")}
    done = subprocess.run(
        [sys.executable, "-m", *words], env=environment, cwd=runner.folder, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def bits_per_byte(folder, texts):
    """Of texts that begin at end_of_text, each by itself, in windows of all that the model has positions for."""
    trained = load_trained(folder, precision="fp32", world=World(0, 1, 0, 1, torch.device("cpu")))
    length, tokenizer = trained.model.config.max_position_embeddings, trained.tokenizer
    nats = 0.0
    for text in texts:
        ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
        done = 1  # of the ids, the first of which is given
        while done < len(ids):
            end = min(done + length, len(ids))
            first = max(0, end - length - 1)  # the last window is a whole one that begins earlier
            window = torch.tensor([ids[first:end]])
            with torch.no_grad():
                logits = trained.model.logits(window[:, :-1])[0, done - first - 1 :]
            nats += float(F.cross_entropy(logits.double(), window[0, done - first :], reduction="sum"))
            done = end
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@pytest.mark.full
def test_everyone_scores_the_same(runner):
    settings = ("validate.questions=40", "validate.samples=1", "schedule.steps=12", "model.num_experts_per_tok=8")
    cut = ("parallel.expert_parallel=2", "parallel.zero_stage=3", "train.micro_batch_size=2")
    done = runner.run("scored", *settings, *cut, processes=2)
    assert done.returncode == 0, done.stderr
    (logged,) = [record for record in runner.records("scored") if record.get("whole")]

    plain = ("--json", "questions=40", "samples=0")
    found = json.loads(call(runner, "k2train", "evaluate", "runs/scored", *plain, "tasks=tasks"))
    assert found["loss"] == pytest.approx(logged["validation_loss"], rel=1e-6)
    assert found["next_line_accuracy"] == pytest.approx(logged["next_line_accuracy"], abs=1.01 / found["questions"])

    call(runner, "k2train", "export", "runs/scored", "folder=scored-hf", "dtype=fp32", "compare=never")
    given = (f"data={found['data']}", "sequence_length=64")
    exported = json.loads(call(runner, "k2train", "evaluate", "scored-hf", *given, *plain))
    for key in ("tokens", "loss", "bits_per_byte", "questions", "next_line_accuracy"):
        assert exported[key] == found[key]

    lm_eval = pytest.importorskip("lm_eval").__name__
    arguments = ("--model_args", "pretrained=scored-hf,dtype=float32", "--device", "cpu", "--batch_size", "8")
    tasks = ("--include_path", "tasks", "--tasks", "k2train_next_line,k2train_held_out", "--output_path", "lm-eval")
    call(runner, lm_eval, "--model", "hf", *arguments, *tasks)
    (written,) = (runner.folder / "lm-eval").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    texts = [json.loads(line)["text"] for line in (runner.folder / "tasks" / "k2train_held_out.jsonl").open()]
    expected = bits_per_byte(runner.folder / "scored-hf", texts)
    assert results["k2train_held_out"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
    # The harness reads longer contexts, and the end of a line where it is a token of its own with the answer.
    theirs = results["k2train_next_line"]["acc_mutual_info,none"]
    assert theirs == pytest.approx(found["next_line_accuracy"], abs=0.15)
