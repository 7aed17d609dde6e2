"""X2 of the evidence: reachability in layered graphs (RESULTS.md, "Evidence: rules"), of the net
trained here from its first step; evidence_smollm2.py has the pretrained one."""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset

from softar.recipes.evidence_mnns import decoders, doses
from softar.recipes.evidence_units import Unit, Watch, on_disk, readouts, rows_hash
from softar.recipes.sft_soft import ROWS

SPARE, ROWS_SEED = 50, 2
PAUSE = "so"  # the token that says nothing
WARM_UPS = Path(__file__).resolve().parent.parent / "runs" / "evidence"  # weights, in a checkout
# the fields that an arm has beside those of its net; "warm" is not trained further
ARMS = {
    "warm": ROWS["trace-soft"],  # read out as that is
    "discrete": ROWS["discrete"],
    "discrete-traces": ROWS["discrete-traces"],
    "trace-soft": ROWS["trace-soft"],
    "guided-soft": ROWS["guided-soft"],
    "pause": ROWS["discrete"],
    "discrete-traces-parity": ROWS["discrete-traces"],
    "trace-soft-parity": ROWS["trace-soft"],
}
TRAINED = tuple(arm for arm in ARMS if arm != "warm")
TRAINING = dict(
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    weight_decay=0.01,
    soft_mode="sequential",
    soft_top_k=16,
)


class Stage(NamedTuple):
    """A part of the warm-up: gold paths through these graphs."""

    graphs: dict  # arguments of `reach`
    rows: int
    steps: int
    rate: float


class Net(NamedTuple):
    """A net, what it is shown and for how long."""

    load: Callable  # (seed, device) -> model and tokenizer
    graphs: dict  # arguments of `reach`
    rows: int  # to train on
    dev: int  # rows to be read
    test: int
    stages: tuple[Stage, ...]
    training: dict
    rates: dict[str, float]
    steps: dict[str, int]  # of each arm, so that all take equally long
    batch_size: int = 500  # of decoding
    edits: bool = True  # also answers after edited thoughts, for which all rows are read at once
    has_parity: bool = True  # also the arms on that task


def small(seed: int, device: str):
    """The Llama of mnns-tiny, wider and deeper, with the words of the task: a name is a token, the
    signs between two names are none, the comma between two links is one."""
    import softar
    from softar.tasks.reach import NOUNS

    words = ["<pad>", "<bos>", "<eos>", ",", "Links", "From", "to", "or", "Path", "odd", "even"]
    words += [PAUSE, *NOUNS[:NAMES]]
    model, _ = softar.load(
        "mnns-tiny", seed=seed, device=device, vocab_size=len(words), **SMALL_NET
    )
    read_links(model)
    return model, split_links(words)


@torch.no_grad()
def read_links(model) -> None:
    """Start the net as one that looks links up, as pretrained ones can: drawn weights take longer to
    learn that than all that is built on it. A head of the first layer copies the token before,
    whatever it is, into the second half of the stream; one of each other layer looks for its own
    token there, and copies what it finds, the nodes that its own one leads to, into the first half.
    All else is drawn, and everything is trained."""
    layers, size = [layer.self_attn for layer in model.model.layers], SMALL_NET["head_dim"]
    words, f = model.get_input_embeddings().weight, model.model.rotary_emb.inv_freq.cpu()
    eye, none = torch.eye(size), torch.zeros(size, size)
    slow = (f * MOST_TOKENS < 1.2).float().repeat(2).diag()  # what no distance turns far
    first, second = torch.cat([eye, none], 1), torch.cat([none, eye], 1)
    words[:, :size] /= SMALL_NET["initializer_range"]
    words[:, size:] = 0
    model.lm_head.weight.copy_(0.3 * words)
    for number, (at, gain) in enumerate(zip(layers, (0.7, 2.0, 1.0), strict=True)):
        at.v_proj.weight[:size] = first
        at.o_proj.weight[:, :size] = gain * (second if number == 0 else first).T
        at.q_proj.weight[:size] = 1.3 * slow @ first if number else 0.0
        at.k_proj.weight[:size] = 1.3 * slow @ second if number else 0.0
    turned = {layers[0].q_proj: 0.0 * f, layers[0].k_proj: f}  # on by one position
    for part, angle in turned.items():
        part.bias[:size] = 6.0 * torch.cat([angle.cos(), angle.sin()])


def split_links(words: list[str]):
    from tokenizers import Regex, pre_tokenizers

    from softar.models import word_tokenizer

    tokenizer = word_tokenizer(words, model_max_length=SMALL_NET["max_position_embeddings"])
    signs = pre_tokenizers.Split(Regex(r"[\s>:?.]+"), "removed")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [signs, pre_tokenizers.Split(",", "isolated")]
    )
    return tokenizer


def smollm2(seed: int, device: str):
    """SmolLM2-135M-Instruct, whose weights no seed changes."""
    import softar

    return softar.load("smollm2-135m", device=device)


def graph_of(prompt: str) -> str:
    """Its links, in the order of the alphabet."""
    links, _, _ = prompt.removeprefix("Links: ").partition(". ")
    return ", ".join(sorted(links.split(", ")))


def drawn(name: str, parity: bool, size: int):
    """-> a task of so many rows to train on, and its held-out rows by split: no graph is there twice."""
    from softar.tasks import reach

    net = NETS[name]
    _, tokenizer = net.load(0, "cpu")
    held_out = net.dev + net.test
    how = dict(held_out=held_out + SPARE, seed=ROWS_SEED, size=size)
    task = reach(**net.graphs, parity=parity, tokenizer=tokenizer, **how)
    first = {}
    for i, prompt in enumerate(task.test["prompt"]):
        first.setdefault(graph_of(prompt), i)
    at = [*first.values()][:held_out]
    if len(at) < held_out:
        raise ValueError(
            f"SPARE={SPARE}: {len(at)} graphs differ, and {held_out} are read: draw more"
        )
    return task, {"dev": task.test.select(at[: net.dev]), "test": task.test.select(at[net.dev :])}


@functools.cache
def data(name: str, parity: bool = False):
    """-> the task of a net, and its held-out rows by split, none of whose graphs is trained on."""
    task, rows = drawn(name, parity, NETS[name].rows)
    learnt = without(task.train, {*map(graph_of, task.test["prompt"])})
    learnt = learnt.select_columns(["prompt", "completion", "traces", "answer"])
    return replace(task, train=on_disk(learnt, f"{task.name}-{name}")), rows


def facts(net: str = "small") -> dict[str, dict]:
    """Of the test rows of a net, what the analysis has to know (`evidence_logs.Rows`)."""
    found = {}
    for arm in settings(net):
        name, parity = ("parity", True) if arm.endswith("parity") else ("reachability", False)
        if name not in found:
            rows = drawn(net, parity, size=1)[1]["test"]  # drawn before those to train on
            found[name] = dict(n=len(rows), hash=rows_hash({"test": rows})["test_rows_hash"])
    return found


def without(rows: Dataset, graphs) -> Dataset:
    """Those about other graphs."""
    return rows.select([i for i, p in enumerate(rows["prompt"]) if graph_of(p) not in graphs])


@functools.cache
def pauses(name: str) -> Dataset:
    """The rows to train on with PAUSE in place of each node of a thought."""
    task, _ = data(name)
    thought = f" {PAUSE}" * task.think_steps
    rows = {"prompt": task.train["prompt"], "answer": task.train["answer"]}
    rows["completion"] = [f"{thought} {answer}" for answer in rows["answer"]]
    return on_disk(Dataset.from_dict(rows), f"pause-{name}")


def fit(model, tokenizer, rows: Dataset, fields: dict, unit: Unit):
    """Train -> the trainer, and the first line of a log."""
    from softar.sft.config import SoftSFTConfig
    from softar.sft.trainer import SoftSFTTrainer

    def make(args: dict) -> SoftSFTTrainer:
        args = SoftSFTConfig(**args)
        return SoftSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)

    return unit.train(make, fields)


def warm(name: str, unit: Unit):
    """The net after the warm-up that all arms of a seed share -> model, tokenizer, and what the
    warm-up was. Its weights stay in WARM_UPS, in a file for each seed and each way to get there, so
    that they are trained once."""
    net = NETS[name]
    model, tokenizer = net.load(unit.seed, unit.device)
    how = [net.graphs, net.stages, net.training, model.config.to_dict()]
    key = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:12]
    file = WARM_UPS / f"{name}-seed{unit.seed}-{unit.device}-{key}.pt"
    if not file.exists():
        about = warm_up(name, model, tokenizer, unit)
        weights = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
        digest = hashlib.sha256(b"".join(each.numpy().tobytes() for each in weights.values()))
        about |= {"weights_hash": digest.hexdigest()[:16]}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(weights=weights, about=about), file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
        model, tokenizer = net.load(unit.seed, unit.device)  # as they are found the next time
    made = torch.load(file, map_location=unit.device, weights_only=True)
    model.load_state_dict(made["weights"], strict=False)  # frozen ones are not in it
    return model, tokenizer, made["about"]


def warm_up(name: str, model, tokenizer, unit: Unit) -> dict:
    """Train the stages, one after the other -> what they took."""
    from softar.tasks import reach

    net, held_out = NETS[name], {graph_of(p) for r in data(name)[1].values() for p in r["prompt"]}
    about = dict(steps=0, processor_seconds=0.0, train_loss=[])
    for number, stage in enumerate(net.stages):
        how = dict(held_out=1, seed=ROWS_SEED + 1 + number, size=stage.rows)
        task = reach(**stage.graphs, tokenizer=tokenizer, **how)
        fields = TRAINING | net.training | ARMS["discrete"]
        fields |= dict(max_steps=stage.steps, learning_rate=stage.rate)
        fields |= dict(think_steps=task.think_steps)
        rows = without(task.train, held_out).select_columns(["prompt", "completion"])
        _, line = fit(model, tokenizer, rows, fields, unit)
        about["steps"] += stage.steps
        about["processor_seconds"] += line["processor_seconds"]
        about["train_loss"].append(line["train_loss"])
    return about


def fields_of(net: Net, arm: str) -> dict:
    """The training arguments of an arm."""
    steps = net.graphs["layers"] - 1
    fields = (
        TRAINING | net.training | ARMS[arm] | dict(think_steps=steps, eval_new_tokens=steps + 2)
    )
    if arm == "warm":
        return fields
    return fields | dict(max_steps=net.steps[arm], learning_rate=net.rates[arm])


def measure(unit: Unit) -> list[dict]:
    """Train an arm from the warm net and read it out: the lines of its log."""
    from softar.sft.config import SoftSFTConfig

    name, arm = unit.options["net"], unit.options["arm"]
    net = NETS[name]
    task, rows = data(name, parity=arm.endswith("parity"))
    model, tokenizer, about = warm(name, unit)
    fields = fields_of(net, arm) | unit.fields
    if arm == "warm":
        args, line = SoftSFTConfig("", **fields, **unit.training), unit.line(Watch(), None, fields)
    else:
        learnt = pauses(name) if arm == "pause" else task.train
        trainer, line = fit(model, tokenizer, learnt, fields, unit)
        args = trainer.args
    lines = [line | rows_hash(rows) | {"warm_up": about}]
    for split in unit.splits:
        made = decoders(model, tokenizer, args, arm.removesuffix("-parity"))
        lines += readouts(made, rows[split], task, split, net.batch_size)
        if arm == "trace-soft" and net.edits:
            lines += list(doses(model, tokenizer, args, rows[split], task, split))
    return lines


def settings(name: str) -> dict[str, dict]:
    """Its arms; parity, which no verdict hangs on, is for a net that trains in minutes."""
    some = [arm for arm in ARMS if NETS[name].has_parity or not arm.endswith("parity")]
    return {arm: dict(net=name, arm=arm) for arm in some}


NAMES, MOST_TOKENS = 24, 60
SMALL_NET = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=160,
    attention_bias=True,
    initializer_range=0.05,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    rms_norm_eps=1e-5,
)
GRAPHS = dict(layers=3, width=4, out_degree=2)
NETS = {
    "small": Net(
        load=small,
        graphs=GRAPHS,
        rows=20_000,
        dev=300,
        test=1000,
        stages=(
            Stage(dict(layers=4, width=3, out_degree=1), rows=10_000, steps=100, rate=3e-3),
            Stage(GRAPHS, rows=20_000, steps=200, rate=3e-3),
        ),
        training=dict(per_device_train_batch_size=64),
        rates=dict.fromkeys(TRAINED, 3e-3),
        # 120 seconds of each, as RESULTS.md says
        steps={arm: 510 if "soft" in arm else 700 for arm in TRAINED},
    ),
    "smollm2": Net(
        load=smollm2,
        graphs=GRAPHS,
        rows=10_000,
        dev=300,
        test=400,
        stages=(Stage(GRAPHS, rows=10_000, steps=500, rate=3e-4),),
        training=dict(
            per_device_train_batch_size=8,
            freeze_embeddings=True,
            freeze_layers=18,
            completion_logits=True,
        ),
        rates=dict.fromkeys(TRAINED, 3e-4),
        steps={arm: 240 if "soft" in arm else 290 for arm in TRAINED},  # 900 seconds
        batch_size=50,
        edits=False,
        has_parity=False,
    ),
}
SEEDS = range(6)
SETTINGS = settings("small")
