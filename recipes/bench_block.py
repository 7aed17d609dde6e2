"""Decoding of block-causal models beside the public samplers, on the same random weights and, after a
check, for the same tokens: tokens per second, taken in turn.

# What each softener costs over hard decoding, and what the exact cache saves
python recipes/bench_block.py

# Beside SDAR's generate.py and dllm's sampler of LLaDA2
python recipes/bench_block.py --family sdar --against SDAR
python recipes/bench_block.py --family llada2 --against dllm

# Ten times the prompt: a forward inside a block costs the same
python recipes/bench_block.py --prompt 640 --soften hard

--against is a clone of github.com/JetAstra/SDAR at c2041a8, or of github.com/ZHZisZZ/dllm at
ca17675, none of which is part of softar. Their loops run over softar's model: their own needs
kernels of a GPU.
"""

import importlib.util
import sys
import time
import types
from pathlib import Path

import torch
from transformers import DynamicCache

from softar.diffusion import SOFTENERS, DenoiseConfig, denoise
from softar.diffusion.experts import Llada2Config, LLaDA2MoeModelLM
from softar.diffusion.families import SdarConfig, SDARForCausalLM
from softar.diffusion.net import parts
from softar.recipes.bench import interleaved, parser_of, run_bench, show, spread

WIDTH = dict(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    head_dim=32,
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


def sdar(block_length: int):
    sizes = WIDTH | dict(vocab_size=151_936, num_key_value_heads=4)
    ids = dict(mask_token_id=151_669, eos_token_id=151_643, block_length=block_length)
    return SDARForCausalLM(SdarConfig(**sizes, **ids))


def llada2(block_length: int):
    sizes = WIDTH | EXPERTS | dict(vocab_size=157_184, num_key_value_heads=4)
    ids = dict(mask_token_id=156_895, eos_token_id=156_892, pad_token_id=156_892)
    return LLaDA2MoeModelLM(Llada2Config(**sizes, **ids, block_length=block_length))


class Reread(DynamicCache):
    """Keys and values to read, which a forward does not add to."""

    def __init__(self, kept: DynamicCache):
        self.kept = kept

    def update(self, keys, values, layer, *args, **kwargs):
        if layer >= len(self.kept.layers) or not self.kept.layers[layer].is_initialized:
            return keys, values
        stored = self.kept.layers[layer]
        return torch.cat([stored.keys, keys], -2), torch.cat([stored.values, values], -2)

    def get_seq_length(self, layer=0):
        return self.kept.get_seq_length(layer)

    def get_mask_sizes(self, query_length, layer):
        return self.kept.get_seq_length(layer) + query_length, 0


class Called:
    """softar's model, called as the public loops call theirs: all logits of each forward."""

    def __init__(self, model):
        self.net, self.device = parts(model), model.device

    def eval(self):
        return self

    def __call__(
        self,
        ids,
        attention_mask,
        position_ids,
        past_key_values=None,
        use_cache=False,
        store_kv=False,
    ):
        # a 0/1 mask, or one to add to the scores
        seen = attention_mask if attention_mask.dim() == 4 else attention_mask[:, None]
        seen = seen == 0 if seen.min() < 0 else seen > 0
        cache = past_key_values if store_kv or past_key_values is None else Reread(past_key_values)
        hidden = self.net.body(self.net.embedding(ids), seen, position_ids, cache)
        return types.SimpleNamespace(logits=self.net.head(hidden))


def sdar_loop(folder: Path, model, args, ids):
    """SDAR's own loop, greedy, from left to right."""
    spec = importlib.util.spec_from_file_location("sdar_generate", folder / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    called = Called(model)
    return lambda: module.block_diffusion_generate(
        called,
        {"input_ids": ids},
        model.config.mask_token_id,
        gen_length=args.new_tokens,
        block_length=args.block_length,
        denoising_steps=args.block_length,
        top_k=1,
        remasking_strategy="sequential",
    )


def llada2_loop(folder: Path, model, args, ids):
    """dllm's sampler, which keeps no keys and values."""
    for name in (
        "dllm",
        "dllm.core",
        "dllm.core.samplers",
        "dllm.pipelines",
        "dllm.pipelines.llada2",
    ):
        package = types.ModuleType(name)  # without what its __init__ imports
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    module = importlib.import_module("dllm.pipelines.llada2.sampler")
    tokenizer = types.SimpleNamespace(
        mask_token_id=model.config.mask_token_id, eos_token_id=model.config.eos_token_id
    )
    sampler = module.LLaDA2Sampler(model=Called(model), tokenizer=tokenizer)
    config = module.LLaDA2SamplerConfig(
        max_new_tokens=args.new_tokens,
        block_size=args.block_length,
        steps_per_block=args.block_length,
        return_dict=False,
    )
    return lambda: sampler.sample([ids[0]], config)


FAMILIES = {"sdar": (sdar, sdar_loop, 4), "llada2": (llada2, llada2_loop, 32)}
SELECT = {"sdar": dict(select="leftmost"), "llada2": dict(schedule="dynamic", threshold=0.95)}


def decoding(args) -> list[dict]:
    build, public, usual = FAMILIES[args.family]
    args.block_length = args.block_length or usual
    torch.manual_seed(args.seed)
    model = build(args.block_length).eval().requires_grad_(False)
    ids = torch.randint(0, 150_000, (1, args.prompt))
    how = SELECT[args.family] | dict(gen_length=args.new_tokens, early_stop=False)

    def ours(**options):
        config = DenoiseConfig(**how, **options)
        return lambda: denoise(model, ids, config=config)

    runs = {name: ours(soften=name) for name in args.soften}
    runs["hard, no cache"] = ours(soften="hard", cache="off")
    if args.against:
        runs["public"] = public(Path(args.against), model, args, ids)
    outputs = {name: run() for name, run in runs.items()}
    hard = outputs["hard"].sequences
    for name in {"hard, no cache", "public"} & outputs.keys():
        out = outputs[name] if name == "public" else outputs[name].sequences
        if not torch.equal(out[:, : hard.shape[1]], hard):
            raise SystemExit(f"{name}: other tokens than hard decoding's")
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = interleaved(runs, args.repeats, warm_up=False, clock=clock)
    rows = []
    for name, took in seconds.items():
        ratio, low, high = spread(a / b for a, b in zip(took, seconds["hard"], strict=True))
        forwards = getattr(outputs[name], "num_forwards", None)
        rows.append(
            dict(
                family=args.family,
                block_length=args.block_length,
                prompt=args.prompt,
                new_tokens=args.new_tokens,
                sampler=name,
                forwards=forwards,
                tokens_per_s=args.new_tokens / spread(took)[0],
                time_of_hard=ratio,
                low=low,
                high=high,
                seconds=took,
            )
        )
    title = (
        f"{args.family}, prompt {args.prompt}, {args.new_tokens} new tokens, one in each forward"
    )
    show(title, rows, ("sampler", "forwards", "tokens_per_s", "time_of_hard", "low", "high"))
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="sdar", help="whose model and loop")
    parser.add_argument("--against", help="folder of the public code")
    parser.add_argument("--block_length", type=int, help="4 of sdar, 32 of llada2")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="a multiple of the block length")
    parser.add_argument(
        "--soften", nargs="+", choices=SOFTENERS, default=[*SOFTENERS], help="softeners to time"
    )
    parser.add_argument("--repeats", type=int, default=5, help="how often each is timed")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="measure processor time, for a busy machine; with --threads 1",
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
