"""The commands: what each is for, which config it reads and where its code is."""

from __future__ import annotations

from dataclasses import dataclass

from k2train.config import (
    CheckConfig,
    EvaluateConfig,
    ExportConfig,
    ImportConfig,
    PlanConfig,
    RehearseConfig,
    RunConfig,
    WriteConfig,
)


@dataclass(frozen=True)
class Command:
    """A command; ``module`` has ``run(config) -> int``, and is imported when the config has been found right."""

    name: str
    summary: str
    explanation: str
    primary: str  # the file in configs/ that it starts from
    groups: tuple[str, ...]  # that this file has in its defaults list
    schema: type
    module: str
    common: tuple[tuple[str, str], ...]  # the overrides people need most, and what they do
    argument: str | None = None  # the key that a word without = is the value of
    switches: tuple[str, ...] = ()  # keys that --KEY sets to true


RUN_GROUPS = ("model", "data", "optim", "schedule", "parallel", "track", "experiment")

PREPARE = Command(
    name="prepare",
    summary="turn text into token shards, which train does by itself if they are not there yet",
    explanation=(
        "Reads the corpus, holds a part of it out for validation, trains the tokenizer and writes token shards to the\n"
        "cache. It takes the same overrides as train, so that train then finds what it needs. A second time it does\n"
        "nothing."
    ),
    primary="train",
    groups=RUN_GROUPS,
    schema=RunConfig,
    module="k2train.cli.prepare",
    common=(
        ("data=folder", "text of your own instead of Python's standard library; needs data.path"),
        ("data.path=DIR", "the folder to read, with all below it"),
        ("data.sources.folder.include=[*.py,*.md]", "only files whose names match one of these patterns"),
        ("data.held_out=0.05", "share of the text kept for validation"),
        ("data.tokenizer.vocab_size=4096", "tokens in the vocabulary"),
        ("data.cache_dir=DIR", "where shards are kept; null: ~/.cache/k2train"),
    ),
)

DATA_SHOW = Command(
    name="data show",
    summary="show what the data of a run holds, with a look at some documents",
    explanation=(
        "Prints documents, tokens, bytes and shards of each split of each source, and the beginning of some of the\n"
        "documents. It takes the same overrides as prepare, and prepares what is not there yet; or the folder or URL\n"
        "of what was prepared."
    ),
    primary="train",
    groups=RUN_GROUPS,
    schema=RunConfig,
    module="k2train.cli.show",
    common=PREPARE.common,
    argument="data.prepared",
)

TRAIN = Command(
    name="train",
    summary="pretrain a model from scratch; goes on by itself where an interrupted run stopped",
    explanation=(
        "Prepares the data if need be, trains under DeepSpeed, and ends with the bits per byte on held-out text, a\n"
        "sample of generated text and a page with the curves, all in runs_dir/name. The same command again resumes\n"
        "a run that was stopped, and shows the result of one that is finished. init_from=RUN begins a new run with\n"
        "the weights of another.\n"
        "\n"
        "Several processes, one for each GPU of a machine:\n"
        "  torchrun --standalone --nproc_per_node N -m k2train train [overrides]\n"
        "\n"
        "A sweep, with a run for each combination of values (see k2train train --multirun --help):\n"
        "  k2train train --multirun name=sweep optim.lr=0.01,0.02 seed=1,2,3"
    ),
    primary="train",
    groups=RUN_GROUPS,
    schema=RunConfig,
    module="k2train.cli.train",
    common=(
        ("name=NAME", "name of the run: its folder under runs_dir"),
        ("model=base", "another size of model (the groups and their options are listed above)"),
        ("data=folder data.path=DIR", "text of your own instead of Python's standard library"),
        ("schedule.steps=2000", "length of the run in steps (in tokens: schedule.steps=null schedule.tokens=N)"),
        ("optim=adamw", "another optimizer"),
        ("optim.lr=0.005", "peak learning rate; optim.roles.ROLE.lr sets that of one kind of parameter"),
        ("train.global_batch_size=64", "sequences a step, over all processes"),
        ("train.micro_batch_size=4", "sequences a process computes at once: lower it if memory runs out"),
        ("parallel.expert_parallel=2", "processes that share out the experts"),
        ("seed=1", "of the weights' start and of the data's order"),
    ),
)

AUDIT = Command(
    name="audit",
    summary="show how each parameter is updated, and prove it by one step",
    explanation=(
        "Takes the first step of the run at its peak learning rate, on its data and under DeepSpeed, measures what\n"
        "it did to the weights, and throws it away. Shows of each parameter its role, its shape as the optimizer sees\n"
        "it, its rule, singular values and RMS of its update against theory, and a verdict. The exit status is 0 if\n"
        "all are right, else 1. It takes the same overrides as train, and several processes in the same way.\n"
        "\n"
        "The cheap part, that each matrix is orthogonalised exactly once, is checked at the start of every run."
    ),
    primary="train",
    groups=RUN_GROUPS,
    schema=RunConfig,
    module="k2train.cli.audit",
    common=(
        ("experiment=tiny", "a small model in seconds"),
        ("model=base", "another size of model"),
        ("optim=adamw", "another optimizer"),
        ("optim.nesterov=false", "any setting of the optimizer"),
        ("parallel.zero_stage=2", "gradients shared out too"),
        ("train.global_batch_size=16", "sequences in the step, over all processes"),
    ),
)

DOCTOR = Command(
    name="doctor",
    summary="check the machines of a run, on every rank: what differs, is slow, wrong or out of reach",
    explanation=(
        "Looks, on all ranks together, at what a run stumbles over: versions, devices, shared memory, limits, the\n"
        "network and which rank is slow on it, clocks, whether runs_dir and the cache are one folder for all ranks\n"
        "and have room, the data. Each verdict (ok, warning, fails) comes with a remedy. The exit status is 1 if\n"
        "something fails. It takes the same overrides as train, and is started in the same way:\n"
        "  launch/torchrun.sh doctor [overrides]"
    ),
    primary="train",
    groups=RUN_GROUPS,
    schema=RunConfig,
    module="k2train.cli.doctor",
    common=(
        ("experiment=1b", "the run that is to be started: all its overrides"),
        ("runs_dir=/shared/runs", "the folder that all ranks must see"),
        ("data.prepared=DIR", "the data that is looked at"),
    ),
)

PLAN = Command(
    name="plan",
    summary="tell what a run would take: memory, traffic, time and money, before it costs anything",
    explanation=(
        "Counts, without torch and in under a second, what a run of this config would take on a cluster: parameters,\n"
        "operations, memory of a GPU by component, bytes sent in a step by kind, and by a roofline model the time of\n"
        "a step, days, GPU-hours and money. --search tries other ZeRO stages, expert parallelism, micro-batches and\n"
        "activation checkpointing, ranks what fits and says why the rest does not. It takes the same overrides as\n"
        "train. The exit status is 0 if the run fits into the memory, else 1. See docs/plan.md."
    ),
    primary="plan",
    groups=(*RUN_GROUPS, "cluster"),
    schema=PlanConfig,
    module="k2train.cli.plan",
    common=(
        ("experiment=k2", "a recipe; see docs/recipes.md"),
        ("cluster=h800-2048", "another machine"),
        ("cluster.nodes=4", "more nodes of it"),
        ("cluster.dollars_per_hour=2", "what a GPU costs an hour"),
        ("parallel.zero_stage=2", "how the run is split, as for train"),
        ("phase=yarn", "one of the schedule's phases alone"),
        ("picture=plan.svg", "memory and time as a picture"),
    ),
    switches=("search", "json"),
)

REHEARSE = Command(
    name="rehearse",
    summary="play one rank of a run of any size, here and now, without GPUs, data and memory",
    explanation=(
        "Builds by the run's own code and DeepSpeed's what a rank of it would have, with a process group that has no\n"
        "other ranks and tensors that have no memory: its experts, its parts of weights, masters and momenta (beside\n"
        "what k2train plan says of them), the matrices that it orthogonalises, and the samples that it reads first.\n"
        "What a launch would find out after hours in a queue, such as sizes that do not divide, it finds in a minute.\n"
        "It takes the same overrides as plan. The exit status is 0 if the run can start and fits, else 1."
    ),
    primary="rehearse",
    groups=(*RUN_GROUPS, "cluster"),
    schema=RehearseConfig,
    module="k2train.cli.rehearse",
    common=(
        ("experiment=k2", "a recipe; see docs/recipes.md"),
        ("cluster=h800-2048", "the machine"),
        ("cluster.nodes=128", "how many of its nodes"),
        ("rank=17", "which of the processes, one for each device"),
        ("parallel.zero_stage=2", "how the run is split, as for train"),
    ),
)

GENERATE = Command(
    name="generate",
    summary="write text with a model that was trained",
    explanation=(
        "Writes a text that begins with the prompt, with the newest checkpoint of a run, with one checkpoint, or with\n"
        "a folder in Hugging Face's format. prompts=FILE writes on each line of a file, and prints lines of JSON."
    ),
    primary="generate",
    groups=(),
    schema=WriteConfig,
    module="k2train.cli.generate",
    common=(
        ("run=runs/first", "the folder of the run, of a checkpoint, or of an exported model"),
        ("generate.prompt=TEXT", "what the text begins with, taken as it stands"),
        ("generate.max_tokens=200", "length of what is written, at most"),
        ("generate.temperature=0.7", "0: always the likeliest token; 1: as the model has learnt it"),
        ("generate.repetition_penalty=1.2", "above 1: less of what was written before"),
        ("generate.seed=1", "another text for each"),
        ("prompts=FILE", "prompts of a file, one a line"),
        ("device=cpu", "where to compute; auto: on a GPU if there is one"),
    ),
    argument="run",
)

EVALUATE = Command(
    name="evaluate",
    summary="tell how good a trained model is, on any prepared text",
    explanation=(
        "Reads held-out text with the newest checkpoint of a run, with one checkpoint, or with a folder in Hugging\n"
        "Face's format, and tells loss and bits per byte of each source, how often the model knows the next line\n"
        "among four, and how much of what it writes parses as Python. See docs/how-to/evaluate.md."
    ),
    primary="evaluate",
    groups=(),
    schema=EvaluateConfig,
    module="k2train.cli.evaluate",
    common=(
        ("run=runs/first", "the folder of the run, of a checkpoint, or of an exported model"),
        ("data=DIR", "what prepare has made of other text by the model's tokenizer"),
        ("tokens=100000", "of each source, where all would take too long"),
        ("sequence_length=1024", "longer or shorter windows than the run was validated with"),
        ("questions=0", "do not ask for next lines"),
        ("samples=0", "do not sample"),
        ("tasks=DIR", "write questions and text for lm-evaluation-harness"),
    ),
    argument="run",
    switches=("json",),
)

EXPORT = Command(
    name="export",
    summary="write a checkpoint in Hugging Face's format",
    explanation=(
        "Writes a folder that transformers, vLLM and lm-evaluation-harness load: weights under the names of Kimi K2's\n"
        "release, configuration, tokenizer, model card. Takes no more memory than the largest tensor. At the end the\n"
        "folder is loaded with transformers, where that is installed, and the logits are compared. See docs/export.md."
    ),
    primary="export",
    groups=(),
    schema=ExportConfig,
    module="k2train.cli.export",
    common=(
        ("checkpoint=runs/first", "the folder of a run, of which the newest checkpoint is taken, or a checkpoint"),
        ("folder=DIR", "where to write"),
        ("dtype=fp32", "weights as they were trained, not rounded to bf16"),
        ("shard_bytes=1000000000", "weights in a file, at most"),
        ("compare=never", "do not load it with transformers at the end"),
    ),
    argument="checkpoint",
)

IMPORT = Command(
    name="import",
    summary="make a starting point of a model in Hugging Face's format",
    explanation=(
        "Reads a folder with a model of DeepSeek-V3's architecture (Kimi K2, Moonlight), or one that was exported, in\n"
        "bf16, fp32 or block-scaled fp8, and writes a run of no steps. Training then goes on from it by one override:\n"
        "  k2train train init_from=runs/NAME name=MINE"
    ),
    primary="import",
    groups=(),
    schema=ImportConfig,
    module="k2train.cli.import_",
    common=(
        ("folder=DIR", "config.json, *.safetensors, tokenizer.json or tiktoken.model"),
        ("name=base", "of the run that it becomes; its folder's name otherwise"),
        ("runs_dir=runs", "where runs are"),
    ),
    argument="folder",
)

CHECKPOINT = (
    ("checkpoint=runs/first", "the folder of a run, of which the newest checkpoint is taken"),
    ("checkpoint=runs/first/checkpoints/step-00000100", "one checkpoint"),
)

INSPECT = Command(
    name="inspect",
    summary="tell what a checkpoint is",
    explanation=(
        "Says of a checkpoint how far it is, the size of its model, its data, the layout and versions it was written\n"
        "with, and its settings. The tensors are not read."
    ),
    primary="checkpoint",
    groups=(),
    schema=CheckConfig,
    module="k2train.cli.inspect",
    common=CHECKPOINT,
    argument="checkpoint",
)

VERIFY = Command(
    name="verify",
    summary="check that a checkpoint is whole",
    explanation=(
        "Reads all of a checkpoint: the size and hash of every file, and that each element of each tensor is there\n"
        "exactly once. The exit status is 0 if it is whole, else 1, and each fault is named."
    ),
    primary="checkpoint",
    groups=(),
    schema=CheckConfig,
    module="k2train.cli.verify",
    common=CHECKPOINT,
    argument="checkpoint",
)

COMMANDS = {
    command.name: command
    for command in (
        *(PREPARE, DATA_SHOW, TRAIN, AUDIT, DOCTOR, PLAN, REHEARSE),
        *(GENERATE, EVALUATE, EXPORT, IMPORT, INSPECT, VERIFY),
    )
}

# Commands without a config of their own; they take options, as in `k2train data trace runs/first --step 5`.
TOOLS = {
    "data": "show what is in the data, and which text a step of a run has read",
    "diff": "tell whether two runs are the same, or where they part",
    "incidents": "list the steps of a run that were out of the ordinary",
    "explain": "show what a step of a run was like, by taking it again from a checkpoint",
    "reproduce": "test a claim about MuonClip by many small runs, with a verdict",
    "report": "make a page of one run, or of several side by side, whatever their state",
    "scale": "foretell loss, learning rate and batch of a larger run from a sweep over sizes",
    "table": "make a table and figures of a sweep, over seeds with intervals",
    "watch": "follow a run from another terminal",
}
