"""What speed.py times, a table at a time: what runs, and what its forwards have to do at least."""

import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from softar.mixers import guide
from softar.recipes import bench_cache, speed_limits
from softar.recipes import gpu_parts as parts
from softar.recipes.bench_block import sdar
from softar.recipes.bench_llada import SIZES
from softar.recipes.speed_limits import Work, size_of
from softar.sft.forward import soft_forward
from softar.soft import mk_proba_dist

SMOLLM2 = dict(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)


class Timed(NamedTuple):
    """A path: what runs, for how many tokens, and what its forwards have to do at least."""

    run: Callable[[], object]
    tokens: int
    works: list[Work]
    is_soft: bool
    beside: str | None = None  # the path of its table that it is compared with
    compiles: bool = False


class Table(NamedTuple):
    """Paths that are taken in turn, on one model."""

    kind: str
    title: str
    model: str
    device: torch.device
    paths: dict[str, Timed]


# -- what the docstrings of these say stands on the page


def decode(args, device: torch.device) -> Iterator[Table]:
    """A prompt is read at once, then each token takes a forward, which reads all weights, and the keys
    and values so far. Hard and soft are softar.generate, model.generate is transformers'."""
    name, model = decoder(args, device)
    for batch in args.batch:
        ids = parts.prompt(batch, args.prompt, model.config.vocab_size, device)
        works = speed_limits.decoding(size_of(model), batch, args.prompt, args.new_tokens)
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        how = Namespace(caches=caches_of(args, device), new_tokens=args.new_tokens)
        paths = {}
        for (way, cache), run in bench_cache.decoders(model, inputs, how).items():
            beside = BESIDE[way] and label(BESIDE[way], cache, how.caches)
            if beside is None and cache != how.caches[0]:
                beside = label(way, how.caches[0], how.caches)
            paths[label(way, cache, how.caches)] = Timed(
                run, batch * args.new_tokens, works, "soft" in way, beside, cache == "compiled"
            )
        yield Table("decode", f"Decoding, batch {batch}", name, device, paths)


def label(way: str, cache: str, caches: list[str]) -> str:
    return way if cache == caches[0] == "dynamic" else f"{way}, {cache}"


def caches_of(args, device: torch.device) -> list[str]:
    """Compiled only where it is asked for, or soon pays and can be."""
    if args.caches:
        return args.caches
    can = device.type == "cuda" and any(map(shutil.which, ("cc", "gcc", "clang")))
    return [name for name in bench_cache.CACHES if can or name != "compiled"]


def denoise(args, device: torch.device) -> Iterator[Table]:
    """One token is decided in each forward, which reads all weights, computes the positions that its
    cache does not hold, and the logits of the masks of its block; a block-causal model's cache, which
    is exact, takes a forward more for each block."""
    for title, name, model, block, caches in denoisers(args, device):
        ids = parts.prompt(1, args.prompt, model.config.vocab_size, device)
        size, new, paths = size_of(model), 2 * args.new_tokens, {}
        for cache in caches:
            for soften in ("hard", "soft-mask"):
                run = denoising(model, ids, new, block, cache, soften)
                works = speed_limits.denoising(size, run(), block, new)
                is_soft, words = soften != "hard", cache or "no cache"
                beside = f"hard, {words if is_soft else caches[0] or 'no cache'}"
                beside = beside if is_soft or cache != caches[0] else None
                paths[f"{soften}, {words}"] = Timed(run, new, works, is_soft, beside)
        yield Table("denoise", title, name, device, paths)


def denoisers(args, device: torch.device):
    """-> title, model's name and model, block length and caches of each table."""
    from softar.diffusion.architectures import LladaConfig, LladaForMaskedDiffusion

    is_gpu, made = device.type == "cuda", dict(dtype=dtype_of(device), device=device)
    shape = SIZES["tiny" if args.dry_run else "8b" if is_gpu else "small"]
    shape = shape | dict(num_key_value_heads=shape["num_attention_heads"])
    model = parts.build(LladaForMaskedDiffusion, LladaConfig(**shape), **made)
    caches = (None, "prefix", "dual")
    yield "Denoising a whole canvas", named("LLaDA", model), model, args.new_tokens, caches
    del model
    width, layers = (32, 1) if args.dry_run else (1024, 28) if is_gpu else (256, 4)
    shape = Namespace(width=width, layers=layers, block_length=4)
    model = parts.build(sdar, shape, **made)
    yield "Denoising block by block", named("SDAR", model), model, 4, ("exact cache",)


def denoising(model, ids, new: int, block: int, cache: str | None, soften: str) -> Callable:
    from softar.diffusion import DenoiseConfig, denoise

    # a block-causal model's own cache has no name, and its decode ends with its text
    how = dict(cache=cache) if cache in (None, "prefix", "dual") else dict(early_stop=False)
    config = DenoiseConfig(gen_length=new, block_length=block, soften=soften, **how)
    return lambda: denoise(model, ids, config=config)


def train(args, device: torch.device) -> Iterator[Table]:
    """Forward and backward, without the optimiser's step: six operations a weight and position. Two
    passes compute the thought, half of each row, twice more; a token counts once."""
    name, model = decoder(args, device)
    model.train()
    rows, length = 2, 2 * args.prompt
    ids = parts.prompt(rows, length, model.config.vocab_size, device)
    thought = torch.zeros_like(ids, dtype=torch.bool)
    thought[:, args.prompt :] = True

    def feed(logits, gold):
        return guide(mk_proba_dist(logits, top_k=10), gold, 0.3)

    def step(passes: int) -> None:
        model.zero_grad()
        if passes:
            logits = soft_forward(model, ids, None, thought, feed, passes=passes)
        else:
            logits = model(ids).logits
        gold = ids[:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), gold).backward()

    size, paths = size_of(model), {}
    for way, passes, beside in (("hard", 0, None), ("soft, 2 passes", 2, "hard")):
        works = speed_limits.training(size, rows * (length + passes * args.prompt))
        run = lambda passes=passes: step(passes)  # noqa: E731
        paths[way] = Timed(run, rows * length, works, passes > 0, beside)
    title = f"A training step, {rows} rows of {length} tokens"
    yield Table("train", title, name, device, paths)


# -- the models


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def decoder(args, device: torch.device):
    """-> name, model."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    made = dict(dtype=dtype_of(device), device=device)
    if args.dry_run:
        shape = LlamaConfig(**parts.SMALL, head_dim=8)
        return "a tiny net", parts.build(LlamaForCausalLM, shape, **made)
    if device.type == "cuda":
        model = parts.build(Qwen3ForCausalLM, Qwen3Config(**parts.QWEN3_06B), **made)
        return "Qwen3-0.6B's shape", model
    return "SmolLM2-135M's shape", parts.build(LlamaForCausalLM, LlamaConfig(**SMOLLM2), **made)


def named(family: str, model) -> str:
    c = model.config
    return f"{family}, V = {c.vocab_size}, d = {c.hidden_size}, {c.num_hidden_layers} layers"


BESIDE = {"model.generate": None, "hard": "model.generate", "soft, top-k 10": "hard"}
TABLES = {"decode": decode, "denoise": denoise, "train": train}
