"""Measurements of masked-diffusion decoding and training, most on random weights: a table each,
and a results.json.

# Tokens per second and ms per forward of every cache and softener
python recipes/bench_diffusion.py denoise

# Beside the public samplers on the same weights, after checking that the tokens are the same
python recipes/bench_diffusion.py denoise --against fast-dllm/llada --original llada/generate.py --soften hard

# Time per inner step of the dual cache, by prompt length
python recipes/bench_diffusion.py prompt-length

# What softening adds to a forward
python recipes/bench_diffusion.py overhead --repeats 10

# Peak memory of softening, beside the dense form
python recipes/bench_diffusion.py memory

# What reading each row twice adds to a training step, on the Latin squares' net
python recipes/bench_diffusion.py training --repeats 7 --cpu_time --threads 1

# Memory of a block-causal model's doubled row in training
python recipes/bench_diffusion.py doubled-row

# Soft masks without training: every softener and its knobs on a trained model and its task
python recipes/bench_diffusion.py softeners --model runs/sft_diffusion/hard-seed42 --task latin

# LLaDA's size, beside what reading the weights takes
python recipes/bench_diffusion.py denoise --size 8b --device cuda --cache dual --new_tokens 256

--against is the folder llada/ of github.com/NVlabs/Fast-dLLM at 24cc59e, as it is (it needs
einops); --original is generate.py of github.com/ML-GSAI/LLaDA at b7e6c35. Neither is part of
softar.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from softar.diffusion import SOFTENERS, DenoiseConfig, denoise
from softar.diffusion.select import Belief
from softar.diffusion.soften import Slots, mk_softener
from softar.recipes.bench_diffusion_training import doubled_row, softeners, training
from softar.recipes.bench_llada import (
    CACHES,
    SIZES,
    build,
    floor_ms,
    prompt_of,
    public,
    samplers,
    tokens,
)
from softar.recipes.bench_tools import (
    clock_of,
    console,
    interleaved,
    largest,
    parser_of,
    run_bench,
    show,
    spread,
    synchronise,
    timed,
)
from softar.soft import soft_embed


def denoising(args) -> list[dict]:
    """Caches x softeners, and the public samplers where given, taken in turn for each cache and
    number of tokens."""
    model = build(args)
    ids = prompt_of(args, args.prompt)
    theirs = public(Path(args.against), model) if args.against else None
    floor = floor_ms(model, args)
    console.print(
        f"reading the weights of a forward at the bandwidth of a copy takes {floor:.3g} ms"
    )
    rows = []
    for new in args.new_tokens:
        for cache in args.cache:
            runs = samplers(args, model, ids, new, cache, theirs)
            outputs = {name: run() for name, run in runs.items()}  # warms up
            for name in {"ours, parity", "LLaDA"} & outputs.keys():
                if not torch.equal(tokens(outputs[name]), tokens(outputs["Fast-dLLM"])):
                    raise SystemExit(
                        f"{name}: other tokens than Fast-dLLM's at {new} new ones, cache {cache}"
                    )
            seconds = interleaved(runs, args.repeats, warm_up=False, clock=args.clock)
            base = next(iter(runs))
            for name, took in seconds.items():
                ratio, low, high = spread(a / b for a, b in zip(seconds[base], took, strict=True))
                forwards = getattr(outputs[name], "num_forwards", None)
                median = spread(took)[0]
                rows.append(
                    dict(
                        bench="denoise",
                        size=args.size,
                        batch=args.batch,
                        prompt=args.prompt,
                        new_tokens=new,
                        cache=cache,
                        sampler=name,
                        tokens_per_s=args.batch * new / median,
                        ms_per_forward=forwards and 1000 * median / forwards,
                        floor_ms=floor,
                        ratio_to=base,
                        ratio=ratio,
                        low=low,
                        high=high,
                        seconds=took,
                    )
                )
            done = [row for row in rows if (row["new_tokens"], row["cache"]) == (new, cache)]
            show(
                f"{args.size}, prompt {args.prompt}, one token a forward; ratio to {base}",
                done,
                COLUMNS,
            )
    return rows


COLUMNS = (
    "new_tokens",
    "cache",
    "sampler",
    "tokens_per_s",
    "ms_per_forward",
    "ratio",
    "low",
    "high",
)


def overhead(args) -> list[dict]:
    """Softeners beside hard decoding, forward by forward: the sum over a run's forwards of the
    least time that each took in the repeats. What disturbs a machine only ever adds, and here the
    disturbance is larger than the difference.
    """
    model, new = build(args), args.new_tokens[0]
    ids = prompt_of(args, args.prompt)
    rows = []
    for cache in args.cache:
        least = {}
        for repeat in range(args.repeats + 1):
            for soften in args.soften[:: 1 if repeat % 2 else -1]:
                config = DenoiseConfig(
                    gen_length=new,
                    block_length=args.block_length,
                    cache=CACHES[cache],
                    soften=soften,
                )
                took = torch.tensor(step_times(model, ids, config, args.clock))
                if repeat > 0:  # the first warms up
                    least[soften] = torch.minimum(took, least.get(soften, took))
        base = args.soften[0]
        for soften in args.soften:
            rows.append(
                dict(
                    bench="overhead",
                    size=args.size,
                    batch=args.batch,
                    prompt=args.prompt,
                    new_tokens=new,
                    cache=cache,
                    soften=soften,
                    ms_per_forward=1000 * least[soften].mean().item(),
                    ratio=(least[soften].mean() / least[base].mean()).item(),
                )
            )
    show(
        f"{args.size}, {new} new tokens, least of {args.repeats}; ratio to {args.soften[0]}",
        rows,
        ("cache", "soften", "ms_per_forward", "ratio"),
    )
    return rows


def step_times(model, ids: Tensor, config: DenoiseConfig, clock) -> list[float]:
    """Seconds of each forward with what belongs to it, but the first."""
    stamps = []

    def stamp(step):
        synchronise()
        stamps.append(clock())

    denoise(model, ids, config=config, callback=stamp)
    return [b - a for a, b in pairwise(stamps)]


@torch.no_grad()
def prompt_length(args) -> list[dict]:
    """Inner steps of one block at the end of prompts of different lengths, and attention alone over
    as many keys."""
    model = build(args)
    c = model.config
    width = args.block_length
    config = DenoiseConfig(
        gen_length=width, block_length=width, cache="dual", soften=args.soften[0]
    )
    ids, attention = {}, {}
    for length in args.prompts:
        ids[length] = prompt_of(args, length)
        q = torch.randn(
            args.batch,
            c.num_attention_heads,
            width,
            c.head_dim,
            dtype=model.dtype,
            device=args.device,
        )
        k = torch.randn(
            args.batch,
            c.num_attention_heads,
            length + width,
            c.head_dim,
            dtype=q.dtype,
            device=q.device,
        )
        attention[length] = lambda q=q, k=k: [sdpa(q, k, k) for _ in range(c.num_hidden_layers)]

    inner, alone = {length: [] for length in args.prompts}, {length: [] for length in args.prompts}
    for repeat in range(args.repeats + 1):
        for length in args.prompts[:: 1 if repeat % 2 else -1]:
            steps = step_times(model, ids[length], config, args.clock)
            took = [timed(attention[length], args.clock) for _ in range(10)]
            if repeat > 0:  # the first warms up
                inner[length].append([1000 * t for t in steps])
                alone[length] += [1000 * t for t in took]
    rows = []
    for length in args.prompts:
        step, low, high = spread(spread(run)[0] for run in inner[length])
        share = spread(alone[length])[0]
        rows.append(
            dict(
                bench="prompt-length",
                size=args.size,
                batch=args.batch,
                prompt=length,
                block=width,
                ms_per_inner_step=step,
                low=low,
                high=high,
                attention_ms=share,
                rest_ms=step - share,
            )
        )
    show(
        f"{args.size}, dual cache, inner steps of a block of {width}",
        rows,
        ("prompt", "ms_per_inner_step", "low", "high", "attention_ms", "rest_ms"),
    )
    return rows


@torch.no_grad()
def memory(args) -> list[dict]:
    """Bytes allocated at the peak: by softening one step of a block, beside the dense [B, L, V]
    form; and by whole denoising runs, hard and soft."""
    size = SIZES[args.size]
    V, D, mask_id = size["vocab_size"], size["hidden_size"], size["mask_token_id"]
    embedding = torch.nn.Embedding(V, D).requires_grad_(False)
    B, n, L = args.batch, args.batch * args.block_length, args.prompt + min(args.new_tokens)
    logits = torch.randn(B, L, V)
    block = logits[:, : args.block_length].reshape(n, V)
    rows = []

    def sparse(name):
        belief = Belief(block, with_entropy=name == "soft-mask")
        belief.prob(belief.top_token[:, None])  # what hard decoding asks for is there already

        def run():
            ids = torch.full((n,), mask_id)
            slots = Slots(belief, ids, ids == mask_id, torch.ones(n), mask_id, embedding)
            return soft_embed(mk_softener(name).fn(slots), embedding)

        return run

    def dense():
        """Soft masking as a mixture over the vocabulary: (1 - lambda) one-hot + lambda top-3
        probabilities."""
        log_p = logits.log_softmax(-1)
        strength = 0.25 * torch.sigmoid(5 * ((log_p.exp() * log_p).sum(-1, keepdim=True) + 1))
        values, ids = logits.topk(3, -1)
        mixture = torch.nn.functional.one_hot(torch.full((B, L), mask_id), V).to(logits.dtype) * (
            1 - strength
        )
        return mixture.scatter_add_(-1, ids, strength * values.softmax(-1)) @ embedding.weight

    def row(what, peak):
        rows.append(
            dict(bench="memory", size=args.size, V=V, B=B, L=L, what=what, peak_mb=peak / 1e6)
        )

    row(f"the logits of a block, [{n}, V]", block.numel() * 4)
    for name in args.soften:
        if name != "hard":
            row(f"softening a block, {name}", largest(sparse(name)))
    row("soft masking, dense [B, L, V]", largest(dense))
    if args.size != "8b":
        model, ids = build(args), prompt_of(args, args.prompt)
        for name in args.soften:
            config = DenoiseConfig(gen_length=args.block_length, soften=name, steps=4)
            row(
                f"4 forwards of denoise, {name}",
                largest(lambda c=config: denoise(model, ids, config=c)),
            )
    show("peak beyond what was there", rows, ("V", "B", "L", "what", "peak_mb"))
    return rows


BENCHES = {
    "training": training,
    "doubled-row": doubled_row,
    "softeners": softeners,
    "denoise": denoising,
    "overhead": overhead,
    "prompt-length": prompt_length,
    "memory": memory,
}


def main() -> None:
    parser = parser_of(__doc__, repeats=3)
    parser.add_argument("bench", choices=BENCHES, help="what to measure")
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the random net")
    parser.add_argument("--device", default="cpu", help="device of the net")
    parser.add_argument("--dtype", help="type of the weights; default: float32, on CUDA bfloat16")
    parser.add_argument(
        "--model",
        default="latin-diffusion-tiny",
        help="softeners: a model that softar.diffusion.load opens",
    )
    parser.add_argument(
        "--task", default="latin", help="softeners: the task whose held-out rows it answers"
    )
    parser.add_argument("--batch", type=int, default=1, help="rows decoded together")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument(
        "--prompts",
        type=int,
        nargs="+",
        default=[256, 512, 1024, 2048, 4096],
        help="prompt-length: tokens of each prompt",
    )
    parser.add_argument(
        "--new_tokens", type=int, nargs="+", default=[64, 256], help="tokens to generate"
    )
    parser.add_argument("--block_length", type=int, default=32, help="tokens of a block")
    parser.add_argument(
        "--cache", choices=CACHES, nargs="+", default=list(CACHES), help="caches to compare"
    )
    parser.add_argument(
        "--soften",
        choices=SOFTENERS,
        nargs="+",
        default=list(SOFTENERS),
        help="softeners to compare",
    )
    parser.add_argument("--against", help="denoise: the folder of the public samplers, see above")
    parser.add_argument("--original", help="denoise: LLaDA's own generate.py; needs --against")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and prompts")
    args = parser.parse_args()
    args.clock = clock_of(args)
    if args.original and not args.against:
        parser.error("--original needs --against, whose model it runs")
    if args.against and not Path(args.against, "generate.py").is_file():
        parser.error(
            f"--against {args.against}: no generate.py is in it, give Fast-dLLM's folder llada"
        )
    if args.original and not Path(args.original).is_file():
        parser.error(f"--original {args.original}: no such file, give LLaDA's generate.py")
    if args.threads:
        torch.set_num_threads(args.threads)
    run_bench(args.bench, BENCHES[args.bench], args)


if __name__ == "__main__":
    main()
