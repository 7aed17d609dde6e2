"""
What a dense decoder takes on GPUs, on paper: memory, tokens per second, seconds and dollars a step, by the formulas
of recipes/README.md ("On larger machines"). Nothing is loaded but the model's configuration.

Examples:

# Llama's 8B and 70B on eight H100, all weights and LoRA
softar estimate

# A model of the hub, or a folder, on other GPUs, with longer thoughts
softar estimate --model Qwen/Qwen3-32B --gpu a100 --gpus 4 --new_tokens 4096

# What share of the limit this machine reaches on a small model, and how far off the estimate is
softar estimate --measure smollm2-135m
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import softar
from softar.checks import check_least, one_line_errors
from softar.decoders.card import describe
from softar.mixers import guide
from softar.recipes import speed_limits
from softar.recipes.bench_tools import console, interleaved, parser_of, run_bench, show, spread
from softar.rl.actions import replay
from softar.rl.chunked import log_prob
from softar.sft.forward import WORTH, soft_forward
from softar.sft.loss import soft_loss
from softar.soft import Soft, mk_proba_dist

GB = 1e9


class Machine(NamedTuple):
    """One of `gpus` alike, as published."""

    products: float  # operations per second of a large matrix product, in the model's type
    bandwidth: float  # bytes per second, of its memory
    link: float  # bytes per second to the others, one way
    memory: float  # bytes
    dollars: float  # an hour
    gpus: int = 8
    step: float = 1.0  # share of the limit that steps of decoding reach
    train: float = 1.0  # that training reaches


class Shape(NamedTuple):
    """Of a dense decoder; numbers, not bytes."""

    weights: int
    read: int  # that a token meets: all but the input embedding, unless it is the output layer, too
    layer: int  # weights of a layer
    adapter: int  # of LoRA on each matrix of each layer
    layers: int
    width: int
    inner: int  # of a layer's feed-forward part
    heads: int
    queries: int  # heads x their width
    values: int  # heads of keys, or of values, x their width
    vocab: int


class Job(NamedTuple):
    """What is asked for. Rows are those of one GPU."""

    lora: bool
    batch: int = 4  # rows of a forward in training
    rows: int = 64  # rows of a step of RL, rolled out together
    prompt: int = 512
    new: int = 512  # tokens of thought and answer
    passes: int = 2  # of soft SFT
    kept: int = 3  # tokens of a mixture that the record has
    recompute: bool = True  # gradient checkpointing
    bytes: int = 2  # of a number that is computed with


def shape_of(config, rank: int = 16) -> Shape:
    """Raise ValueError for what is not a dense decoder as Llama is one."""
    config = config.get_text_config(decoder=True)
    said = vars(config)
    if missing := [name for name in SIZES if not isinstance(said.get(name), int)]:
        raise ValueError(
            f"{config.model_type} has no {missing[0]} as Llama has: such models are not estimated"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    width, inner, layers, heads, vocab = (said[name] for name in SIZES)
    queries = heads * (head_width := said.get("head_dim") or width // heads)
    values = (said.get("num_key_value_heads") or heads) * head_width
    stack = next((m for m in model.modules() if isinstance(m, nn.ModuleList)), [])
    seven = [(queries, width), (width, queries), *[(values, width)] * 2]
    seven += [*[(inner, width)] * 2, (width, inner)]
    if [matrices_of(layer) for layer in stack] != [sorted(seven)] * layers:
        raise ValueError(
            f"{config.model_type} has not in each layer the seven matrices of Llama's, four of attention "
            "and gate, up and down: such models are not estimated, take one that has"
        )
    matrices = [m for m in stack.modules() if isinstance(m, nn.Linear)]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights, in_stack = (sum(p.numel() for p in m.parameters()) for m in (model, stack))
    return Shape(
        weights,
        weights - (0 if head is embedding else embedding.numel()),
        in_stack // layers,
        sum(rank * (m.in_features + m.out_features) for m in matrices),
        *(layers, width, inner, heads, queries, values, vocab),
    )


def matrices_of(layer: nn.Module) -> list[tuple]:
    """Their shapes; experts and filters among them."""
    return sorted(tuple(p.shape) for p in layer.parameters() if p.dim() > 1)


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


# -- bytes of one GPU


def states(s: Shape, job: Job, gpus: int) -> float:
    """Weights, gradients and AdamW's two moments, in float32 where they are trained; split."""
    return (16 * (s.adapter if job.lora else s.weights) + job.lora * job.bytes * s.weights) / gpus


def at_hand(s: Shape, job: Job, gpus: int) -> float:
    """What is whole in its forward: embedding, output layer and two layers, and in full training as
    much of their gradients. On one GPU the copies that autocast makes."""
    if gpus == 1:
        return 0 if job.lora or job.bytes == 4 else job.bytes * s.weights
    whole = s.weights - (s.layers - 2) * s.layer
    return job.bytes * whole * (1 if job.lora else 2)


def layer_activations(s: Shape, bytes: int) -> int:
    """What a layer of Llama's keeps of a token for its backward pass, attention fused."""
    norms, gates = 2 * (4 + 2 * bytes) * s.width + 8, 4 * bytes * s.inner
    return norms + gates + 2 * bytes * (s.queries + s.values) + 4 * s.heads


def activations(s: Shape, job: Job, forwards: int) -> int:
    tokens, layer = job.batch * (job.prompt + job.new), layer_activations(s, job.bytes)
    if job.recompute:
        return tokens * (forwards * s.layers * job.bytes * s.width + layer)
    return tokens * forwards * s.layers * layer


def cache(s: Shape, job: Job, rows: int, length: int) -> int:
    """Keys and values."""
    return 2 * s.layers * s.values * job.bytes * rows * length


def record(job: Job, rows: int) -> int:
    """Ids and weights of each mixture; token, kind, log-probability and entropy of each step."""
    return rows * job.new * (12 * job.kept + 17)


def memory(s: Shape, job: Job, gpus: int) -> dict[str, float]:
    """Bytes at the peak of soft SFT, of RL's update and of its rollout."""
    kept, whole = states(s, job, gpus), at_hand(s, job, gpus)
    length, logits = job.prompt + job.new, job.batch * s.vocab
    sft = activations(s, job, job.passes + 1) + 5 * job.bytes * logits * length
    update = activations(s, job, 1) + (8 + 2 * job.bytes) * logits * job.new
    decoded = job.bytes * s.weights if gpus > 1 else whole
    decoded += cache(s, job, job.rows, length) + 12 * job.rows * s.vocab + record(job, job.rows)
    decoded += 3 * job.bytes * job.rows * job.prompt * s.inner  # gate, up and product, of prompts
    return dict(SFT=kept + whole + sft, update=kept + whole + update, rollout=kept + decoded)


# -- seconds


def decode_seconds(s: Shape, job: Job, m: Machine, rows: int) -> float:
    """Of job.new steps, for so many rows on one GPU, and of reading their prompts before."""
    read = job.bytes * s.read + cache(s, job, rows, job.prompt + job.new // 2)
    step = max(read / m.bandwidth, 2 * s.read * rows / m.products)
    return job.new * step / m.step + training_seconds(s, job, m, rows * job.prompt, gradient=False)


def training_seconds(
    s: Shape, job: Job, m: Machine, tokens: float, *, forwards: int = 1, gradient: bool = True
) -> float:
    """Of so many tokens through `forwards` forwards each, backward too. Weights come together, and
    gradients apart, while others are computed with."""
    token = 2 * s.read + 2 * s.layers * s.queries * (job.prompt + job.new)
    times = 1 + gradient * (1 + (not job.lora) + job.recompute)
    computed = forwards * tokens * token * times / m.products / m.train
    if m.gpus == 1:
        return computed
    trained = s.adapter if job.lora else s.weights
    sent = job.bytes * (forwards * (1 + gradient) * s.weights + gradient * trained)
    return max(computed, sent * (1 - 1 / m.gpus) / m.link)


def update_seconds(s: Shape, job: Job, m: Machine) -> float:
    """Of AdamW: four numbers read and three written, in float32."""
    return 28 * (s.adapter if job.lora else s.weights) / m.gpus / m.bandwidth / m.train


def seconds(s: Shape, job: Job, m: Machine) -> dict[str, float]:
    """Of a step of soft SFT, of batch rows, and of GRPO, of job.rows in micro-batches."""
    length = job.prompt + job.new
    positions = 1 + job.passes  # of a row, in rows; refreshes without a prompt where that is kept
    once = 1 + job.passes * job.new / length
    if m.gpus == 1 and not job.recompute and once < WORTH * positions:
        positions = once
    sft = training_seconds(s, job, m, job.batch * length, forwards=positions)
    pieces = math.ceil(job.rows / job.batch)
    update = pieces * training_seconds(s, job, m, job.rows / pieces * length)
    rollout = decode_seconds(s, job, m, job.rows)
    end = update_seconds(s, job, m)
    return dict(sft=sft + end, rollout=rollout, grpo=rollout + update + end)


def row_of(name: str, s: Shape, job: Job, m: Machine) -> dict:
    """A line of the table."""
    found, took = memory(s, job, m.gpus), seconds(s, job, m)
    fits = {"SFT": found["SFT"], "GRPO": max(found["update"], found["rollout"])}
    return {
        "model": name,
        "trains": "LoRA" if job.lora else "all",
        "states, GB": f"{states(s, job, m.gpus) / GB:.1f}",
        **{f"{part}, GB": f"{size / GB:.1f}" for part, size in found.items()},
        "fits": ", ".join(part for part, size in fits.items() if size < m.memory) or "nothing",
        "rollout, tokens/s": rounded(m.gpus * job.rows * job.new / took["rollout"]),
        "SFT step, s": f"{took['sft']:.3g}",
        "GRPO step, s": f"{took['grpo']:.3g}",
        "$ per 1000 GRPO steps": rounded(took["grpo"] / 3.6 * m.gpus * m.dollars),
    }


def rounded(x: float) -> str:
    return f"{float(f'{x:.2g}'):,.0f}"


def markdown(rows: list[dict]) -> str:
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# -- this machine


def parts_of(model, job: Job) -> dict:
    """What decoders and trainers spend their time in, by name -> a run."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    shape = job.rows, job.prompt + job.new
    ids = torch.randint(model.config.vocab_size, shape, device=model.device)
    is_new = (torch.arange(ids.shape[1], device=ids.device) >= job.prompt).expand(job.batch, -1)
    config = softar.SoftConfig(mixer="k-samples", top_k=None, max_new_tokens=job.new)

    def decode(rows: int):
        prompt = ids[:rows, : job.prompt]  # some may begin or end with a pad token
        return softar.generate(model.eval(), prompt, torch.ones_like(prompt), config=config)

    def sft():
        def feed(logits, gold):
            return guide(mk_proba_dist(logits, top_k=10), gold, 0.3, "mix")

        gold, real = ids[: job.batch], torch.ones_like(ids[: job.batch])
        logits = soft_forward(model.train(), gold, real, is_new, feed, passes=job.passes)
        soft_loss(logits, gold.masked_fill(~is_new, -100), is_new)[0].backward()
        learn()

    def grpo():
        record = decode(job.rows).record
        for some in torch.arange(job.rows).split(job.batch):
            read, prompt = Soft(record.ids[some], record.weights[some]), ids[some, : job.prompt]
            token = record.token[some]
            whole = torch.ones_like(prompt), read, torch.ones_like(token)
            log_prob(replay(model.train(), prompt, *whole), token[..., None]).mean().backward()
        learn()

    def learn():
        optimizer.step()
        optimizer.zero_grad()

    decodes = {f"decode {n}": lambda n=n: decode(n) for n in (1, job.rows)}
    return decodes | dict(sft=sft, grpo=grpo)


def measure(args) -> list[dict]:
    """Seconds of each part beside its limit. On a GPU in bfloat16, all that AdamW moves too."""
    check_least(args, repeats=1)
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    model, _ = softar.load(args.measure, dtype=dtype, device=device)
    shape, rows = shape_of(model.config), []
    model.generation_config.eos_token_id = None  # all run to their full length
    job = Job(False, batch=2, rows=8, prompt=32, new=32, recompute=False)
    job = job._replace(bytes=model.dtype.itemsize)
    took = interleaved(parts_of(model, job), args.repeats)
    rates = speed_limits.measured(model.device, model.dtype, model.num_parameters() < 2**24)
    machine = Machine(rates.operations, rates.read, 0, 0, 0, gpus=1)
    least = seconds(shape, job, machine)
    alone = decode_seconds(shape, job, machine, 1)
    limits = alone, least["rollout"], least["sft"], least["grpo"]
    for (name, found), limit in zip(took.items(), limits, strict=True):
        median, low, high = spread(found)
        row = dict(part=name, limit_s=limit, seconds=median, share=limit / median)
        rows.append(row | dict(share_low=limit / high, share_high=limit / low))
    show(f"{args.measure}: {speed_limits.said(rates)}", rows, tuple(rows[0]))
    return rows


# -- the command


def table(args) -> list[dict]:
    """A line for each model, all weights and LoRA."""
    least = dict(gpus=1, lora_r=1, batch=1, rows=1, prompt=1, new_tokens=1, passes=0)
    check_least(args, **least)
    for name in ("step_share", "train_share"):
        if not 0 < (share := vars(args)[name]) <= 1:
            raise ValueError(f"{name}={share} must be above 0 and at most 1")
    machine = GPUS[args.gpu]._replace(gpus=args.gpus, step=args.step_share, train=args.train_share)
    sizes = dict(batch=args.batch, rows=args.rows, prompt=args.prompt, new=args.new_tokens)
    sizes |= dict(passes=args.passes, recompute=not args.keep_activations)
    rows = []
    for name in args.model:
        shape = shape_of(config_of(name), args.lora_r)
        rows += [row_of(name, shape, Job(lora, **sizes), machine) for lora in (False, True)]
    console.print(markdown(rows), soft_wrap=True, highlight=False)
    return rows


def config_of(name: str):
    """Raises ValueError for a name of no model, or of one that fills masks."""
    if name in MODELS:
        return LlamaConfig(**MODELS[name])
    if name in softar.models.MODELS or name.endswith(".gguf"):
        return softar.load(name)[0].config
    if describe(name).kind == "diffusion":
        raise ValueError(f"model={name!r} fills masks: such models are not estimated")
    softar.models.check_there(name, [*MODELS, *softar.models.MODELS])
    return AutoConfig.from_pretrained(name)


LLAMA = dict(num_key_value_heads=8, vocab_size=128_256)
MODELS = {  # Llama 3.1
    "8b": dict(num_attention_heads=32, num_hidden_layers=32)
    | dict(hidden_size=4096, intermediate_size=14_336, **LLAMA),
    "70b": dict(num_attention_heads=64, num_hidden_layers=80)
    | dict(hidden_size=8192, intermediate_size=28_672, **LLAMA),
}
# as published for dense bfloat16; what an hour costs is a round guess
GPUS = {
    "a100": Machine(312e12, 2.04e12, 300e9, 80e9, 2),
    "h100": Machine(989e12, 3.35e12, 450e9, 80e9, 3),
    "h200": Machine(989e12, 4.8e12, 450e9, 141e9, 4),
}
OPTIONS = {
    "gpus": (8, "so many, joined by NVLink"),
    "lora_r": (16, "rank of LoRA"),
    "batch": (4, "rows of a GPU in a forward of training"),
    "rows": (64, "rows of a GPU in a step of GRPO"),
    "prompt": (512, "tokens of a prompt"),
    "new_tokens": (512, "tokens of thought and answer"),
    "passes": (2, "refreshes of soft SFT"),
    # of the limit, measured on a small model: RESULTS.md, section 25
    "step_share": (0.5, "of the limit, that decoding reaches"),
    "train_share": (0.4, "of the limit, that training reaches"),
    "repeats": (3, "how often --measure times a part"),
}


def main() -> None:
    parser = parser_of(__doc__)
    about = "8b, 70b, a name of `softar models`, a folder, a .gguf file or a hub id"
    parser.add_argument("--model", nargs="+", default=[*MODELS], help=about)
    parser.add_argument("--gpu", default="h100", choices=GPUS, help="which")
    parser.add_argument("--keep_activations", action="store_true", help="recompute none")
    parser.add_argument("--measure", metavar="MODEL", help="time this one here, beside its limits")
    for name, (default, about) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=about)
    args = parser.parse_args()
    alone = {"measure", "output", "repeats"}  # what --measure reads
    beside = vars(args).keys() - alone if args.measure else {"repeats"}
    with one_line_errors(Path(sys.argv[0]).name, (ValueError, ImportError, OSError)):
        for name in sorted(beside):
            if (value := vars(args)[name]) != parser.get_default(name):
                how = "beside" if args.measure else "without"
                raise ValueError(f"{name}={value} does nothing {how} --measure: leave it out")
        run_bench("estimate", measure if args.measure else table, args)


if __name__ == "__main__":
    main()
