"""
Decoding with a growing cache, a static one, and a step compiled over that: softar.generate, hard and soft, beside
model.generate. A table and a cache.json.

# The embedded SmolLM2-135M; ratios are to the first row, of pairs taken in turn
python recipes/bench_cache.py

# On a busy machine: processor time, one thread
OMP_NUM_THREADS=1 python recipes/bench_cache.py --cpu_time --threads 1 --repeats 7 --new_tokens 32

# bfloat16 beside float32
python recipes/bench_cache.py --dtypes float32 bfloat16 --caches dynamic static
"""

import torch

import softar
from softar.caches import compiling
from softar.recipes.bench_tools import (
    clock_of,
    interleaved,
    parser_of,
    run_bench,
    show,
    spread,
    timed,
)

CACHES = {
    "dynamic": {},
    "static": dict(cache_implementation="static"),
    "compiled": dict(cache_implementation="static", compile=True),
}
PROMPT = 16  # tokens
WAYS = {"hard": dict(mixer="hard", top_k=None), "soft, top-k 10": dict(top_k=10)}


def decoders(model, inputs: dict, args) -> dict:
    """What is timed, (decoder, cache) -> a run of args.new_tokens steps."""

    def transformers(cache_implementation=None, compile=False):
        how = compiling(model.device) if compile else None
        if how is not None:
            how._compile_all_devices = True  # a CPU is left out otherwise
        return model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=args.new_tokens,
            cache_implementation=cache_implementation,
            compile_config=how,
            disable_compile=not compile,
        )

    def ours(way, **how):
        config = softar.SoftConfig(max_new_tokens=args.new_tokens, **WAYS[way])
        return softar.generate(model, **inputs, config=config, **how)

    runs = {}
    for cache in args.caches:
        runs["model.generate", cache] = lambda how=CACHES[cache]: transformers(**how)
        for way in WAYS:
            runs[way, cache] = lambda way=way, how=CACHES[cache]: ours(way, **how)
    return runs


def cost(args) -> list[dict]:
    runs, rows = {}, []
    for dtype in args.dtypes:
        model, _ = softar.load(args.model, dtype=dtype)
        model.generation_config.eos_token_id = None  # all run to their full length
        size = min(model.config.vocab_size, args.batch * PROMPT)
        ids = (
            torch.arange(args.batch * PROMPT, device=model.device)
            .remainder(size)
            .view(args.batch, PROMPT)
        )
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        for what, run in decoders(model, inputs, args).items():
            runs[dtype, *what] = run
    first = {what: timed(run, clock_of(args)) for what, run in runs.items()}
    seconds = interleaved(runs, args.repeats, warm_up=False, clock=clock_of(args))
    base = seconds[next(iter(runs))]
    for (dtype, decoder, cache), took in seconds.items():
        ratio, low, high = spread(a / b for a, b in zip(base, took, strict=True))
        median = spread(took)[0]
        row = dict(bench="cache", model=args.model, batch=args.batch, new_tokens=args.new_tokens)
        row |= dict(dtype=dtype, decoder=decoder, cache=cache, repeats=args.repeats)
        row |= dict(tokens_per_s=args.batch * args.new_tokens / median, ratio=ratio)
        row |= dict(
            ratio_low=low, ratio_high=high, more_at_first=first[dtype, decoder, cache] - median
        )
        rows.append(row | dict(clock="processor" if args.cpu_time else "wall"))
    show(
        "decoding by kind of cache: tokens/s, and their ratio to the first row; seconds more that the first run took",
        rows,
        (
            "dtype",
            "decoder",
            "cache",
            "tokens_per_s",
            "ratio",
            "ratio_low",
            "ratio_high",
            "more_at_first",
        ),
    )
    return rows


def main() -> None:
    parser = parser_of(__doc__, repeats=7)
    parser.add_argument("--model", default="smollm2-135m", help="a model that softar.load opens")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="types of the weights")
    parser.add_argument("--caches", nargs="+", default=[*CACHES], choices=CACHES, help="which")
    parser.add_argument("--batch", type=int, default=1, help="rows decoded together")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens to generate")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    run_bench("cache", cost, args)


if __name__ == "__main__":
    main()
