"""Decoding of block-causal models beside the public samplers, on the same random weights and, after a
check, for the same tokens: tokens per second, taken in turn.

# What each softener costs over hard decoding, and what the exact cache saves
python recipes/bench_block.py

# Beside SDAR's generate.py, dllm's sampler of LLaDA2 and Fast-dLLM v2's generate
python recipes/bench_block.py --family sdar --against SDAR
python recipes/bench_block.py --family llada2 --against dllm
python recipes/bench_block.py --family fast_dllm_v2 --against Fast_dLLM_v2_7B

# DiffusionGemma beside the loop of transformers, milliseconds a step
python recipes/bench_block.py --family diffusion_gemma --steps 4

# Where the body costs more than the head, as in a model of 0.6 billion parameters
python recipes/bench_block.py --width 1024 --layers 28 --new_tokens 16

# Ten times the prompt: a forward inside a block costs the same
python recipes/bench_block.py --prompt 640 --soften hard

--against is a clone of github.com/JetAstra/SDAR at c2041a8 or of github.com/ZHZisZZ/dllm at ca17675,
or the folder of Fast-dLLM v2's modeling.py; none is part of softar. Their loops run over softar's
model: their own needs kernels of a GPU.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from softar.diffusion import SOFTENERS, DenoiseConfig, denoise
from softar.diffusion.experts import Llada2Config, LLaDA2MoeModelLM
from softar.diffusion.families import (
    Fast_dLLM_QwenForCausalLM,
    FastDllmConfig,
    SdarConfig,
    SDARForCausalLM,
)
from softar.diffusion.masked import Masked
from softar.recipes.bench_tools import interleaved, parser_of, run_bench, show, spread, timed
from softar.recipes.block_loops import fast_loop, llada2_loop, sdar_loop

FIXED = dict(
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
EXPERTS = dict(
    moe_intermediate_size=128,
    num_experts=8,
    num_experts_per_tok=2,
    num_shared_experts=1,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
)


def sizes(args) -> dict:
    own = dict(hidden_size=args.width, intermediate_size=3 * args.width)
    return FIXED | own | dict(num_hidden_layers=args.layers)


def sdar(args):
    ids = dict(mask_token_id=151_669, eos_token_id=151_643, block_length=args.block_length)
    more = dict(vocab_size=151_936, head_dim=args.width // 8)
    return SDARForCausalLM(SdarConfig(**sizes(args), **more, **ids))


def fast_dllm_v2(args):
    ids = dict(mask_token_id=151_665, eos_token_id=151_645, block_length=args.block_length)
    return Fast_dLLM_QwenForCausalLM(FastDllmConfig(**sizes(args), vocab_size=152_064, **ids))


def llada2(args):
    ids = dict(mask_token_id=156_895, eos_token_id=156_892, pad_token_id=156_892)
    more = EXPERTS | dict(vocab_size=157_184, head_dim=args.width // 8)
    config = Llada2Config(**sizes(args), **more, **ids, block_length=args.block_length)
    return LLaDA2MoeModelLM(config)


def diffusion_gemma(args):
    vision = dict(
        model_type="gemma4_vision",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        position_embedding_size=16,
    )
    more = dict(
        vocab_size=262_144,
        head_dim=args.width // 8,
        global_head_dim=args.width // 8,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=128,
        layer_types=["sliding_attention"] * (args.layers - 1) + ["full_attention"],
        pad_token_id=0,
        eos_token_id=None,
    )
    config = DiffusionGemmaConfig(
        text_config=sizes(args) | more | dict(tie_word_embeddings=True),
        vision_config=vision,
        canvas_length=args.block_length,
        image_token_id=262_143,
    )
    return DiffusionGemmaForBlockDiffusion(config)


class Family(NamedTuple):
    build: Callable  # args -> the model
    block_length: int
    how: dict  # options of DenoiseConfig that decode as the public loop
    public: Callable | None = None  # (folder, model, args, ids, ...) -> its loop
    cached: str | None = None  # the parity that has a cache inside of blocks


FAMILIES = {
    "sdar": Family(sdar, 4, dict(select="leftmost"), sdar_loop),
    "llada2": Family(llada2, 32, dict(schedule="dynamic", threshold=0.95), llada2_loop),
    "fast_dllm_v2": Family(fast_dllm_v2, 32, dict(threshold=1.0), fast_loop, cached="fast_dllm_v2"),
    "diffusion_gemma": Family(diffusion_gemma, 64, {}),
}


def of_masks(args, family: Family, model, ids) -> tuple[dict, list[tuple[str, str]]]:
    """-> the runs, and pairs of them that give the same tokens."""
    how = family.how | dict(gen_length=args.new_tokens, early_stop=False)
    sub = dict(sub_block_length=args.sub_block_length) if family.cached else {}

    def ours(**options):
        config = DenoiseConfig(**how | sub | options)
        return lambda: denoise(model, ids, config=config).sequences

    runs = {name: ours(soften=name) for name in args.soften}
    runs["hard, no cache"], same = ours(soften="hard", cache="off"), [("hard, no cache", "hard")]
    if args.against:
        folder = Path(args.against)
        runs["public"] = family.public(folder, model, args, ids)
        same.append(("public", "hard"))
    if family.cached:
        runs["block cache"] = ours(cache="dual")
    if family.cached and args.against:
        public = dict(parity=family.cached, block_length=args.block_length)
        runs["block cache, parity"] = ours(cache="dual", **public)
        runs["public, block cache"] = family.public(folder, model, args, ids, use_block_cache=True)
        same.append(("public, block cache", "block cache, parity"))
    return runs, same


def of_canvases(args, model, ids) -> tuple[dict, list[tuple[str, str]]]:
    """As `of_masks`; all steps are taken."""
    model.set_experts_implementation("eager")
    steps = args.steps * -(-args.new_tokens // args.block_length)

    def ours(**options):
        config = DenoiseConfig(gen_length=args.new_tokens, steps=steps, stop="never", **options)
        return lambda: (
            denoise(
                model, ids, config=config, rng=torch.Generator().manual_seed(args.seed)
            ).sequences
        )

    def theirs():
        torch.manual_seed(args.seed)
        never = dict(confidence_threshold=1e-30, max_denoising_steps=args.steps)
        return model.generate(ids, max_new_tokens=args.new_tokens, **never).sequences

    runs = {"as trained": ours()} | {name: ours(soften=name) for name in args.soften}
    runs |= {"parity": ours(parity="diffusion_gemma"), "public": theirs}
    return runs, [("public", "parity")]


def softening(run, clock, times: int = 3) -> float:
    """The share of its time in which a run makes mixtures, the least of so many: what it costs
    beside the logits that it asks for."""
    spent, make = [], Masked._soften

    def watched(*args):
        started = clock()
        made = make(*args)
        spent.append(clock() - started)
        return made

    Masked._soften, shares = watched, []
    try:
        for _ in range(times):
            spent.clear()
            took = timed(run, clock)
            shares.append(sum(spent) / took)
    finally:
        Masked._soften = make
    return min(shares)


def decoding(args) -> list[dict]:
    family = FAMILIES[args.family]
    args.block_length = args.block_length or family.block_length
    torch.manual_seed(args.seed)
    model = family.build(args).eval().requires_grad_(False)
    ids = torch.randint(1, 150_000, (1, args.prompt))
    is_masked = family.public is not None
    runs, same = of_masks(args, family, model, ids) if is_masked else of_canvases(args, model, ids)
    halves = [model.model] if is_masked else [model.model.encoder, model.model.decoder]
    calls, outputs, forwards = [], {}, {}
    hooks = [half.register_forward_hook(lambda *_: calls.append(1)) for half in halves]
    for name, run in runs.items():
        outputs[name], forwards[name] = run(), len(calls) - sum(forwards.values())
    for hook in hooks:
        hook.remove()
    for name, other in same:
        width = min(outputs[name].shape[1], outputs[other].shape[1])
        if not torch.equal(outputs[name][:, :width], outputs[other][:, :width]):
            raise SystemExit(f"{name}: other tokens than {other}")
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = interleaved(runs, args.repeats, warm_up=False, clock=clock)
    shares = {name: softening(run, clock) for name, run in runs.items()}
    first, rows = next(iter(runs)), []
    for name, took in seconds.items():
        ratio, low, high = spread(a / b for a, b in zip(took, seconds[first], strict=True))
        rows.append(
            dict(
                family=args.family,
                block_length=args.block_length,
                prompt=args.prompt,
                new_tokens=args.new_tokens,
                width=args.width,
                layers=args.layers,
                sampler=name,
                forwards=forwards[name],
                tokens_per_s=args.new_tokens / spread(took)[0],
                ms_per_forward=1000 * spread(took)[0] / forwards[name],
                time_of_first=ratio,
                low=low,
                high=high,
                softening=shares[name],
                seconds=took,
            )
        )
    title = f"{args.family}, prompt {args.prompt}, {args.new_tokens} new tokens"
    columns = ("sampler", "forwards", "tokens_per_s", "ms_per_forward", "time_of_first")
    show(title, rows, (*columns, "low", "high", "softening"))
    return rows


def main() -> None:
    parser = parser_of(__doc__, repeats=5)
    parser.add_argument("--family", choices=FAMILIES, default="sdar", help="whose model and loop")
    parser.add_argument("--against", help="folder of the public code")
    parser.add_argument("--block_length", type=int, help="4 of sdar, 64 of canvases, else 32")
    parser.add_argument("--sub_block_length", type=int, default=8, help="of fast_dllm_v2")
    parser.add_argument("--steps", type=int, default=4, help="of each canvas")
    parser.add_argument("--width", type=int, default=256, help="of the model, a multiple of 8")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="a multiple of the block length")
    parser.add_argument(
        "--soften", nargs="+", choices=SOFTENERS, default=[*SOFTENERS], help="softeners to time"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the prompt")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if "hard" not in args.soften:
        args.soften = ["hard", *args.soften]
    run_bench("bench_block", decoding, args)


if __name__ == "__main__":
    main()
