"""What bench_diffusion.py measures on: LLaDA with random weights, and the public samplers around the
very same tensors."""

import importlib
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor

from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion.architectures import (
    LLADA_NEEDS,
    LladaConfig,
    LladaForMaskedDiffusion,
    llama_name,
)
from softar.recipes.bench_tools import interleaved

LLADA = dict(vocab_size=126_464, mask_token_id=126_336, eos_token_id=126_081, bos_token_id=126_080)
EIGHTH = dict(vocab_size=15_808, mask_token_id=15_792, eos_token_id=15_760, bos_token_id=15_759)
TINY = dict(vocab_size=512, mask_token_id=511, eos_token_id=510, bos_token_id=509)
SIZES = {  # vocabulary, width, inner width, layers, heads
    "tiny": TINY
    | dict(hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4),
    "small": LLADA
    | dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8),
    # all widths of 8b and its vocabulary by 8: the head is as small a part of a forward as there
    "eighth": EIGHTH
    | dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=32, num_attention_heads=4),
    "8b": LLADA
    | dict(
        hidden_size=4096, intermediate_size=12_288, num_hidden_layers=32, num_attention_heads=32
    ),
}


CACHES = {"none": None, "prefix": "prefix", "dual": "dual"}
PUBLIC = {
    "none": "generate",
    "prefix": "generate_with_prefix_cache",
    "dual": "generate_with_dual_cache",
}


def build(args) -> LladaForMaskedDiffusion:
    """Random weights, made where and in the dtype they are used."""
    size = SIZES[args.size]
    room = max(4096, max(args.prompts) + args.block_length, args.prompt + max(args.new_tokens))
    config = LladaConfig(
        **size,
        num_key_value_heads=size["num_attention_heads"],
        max_position_embeddings=room,
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    torch.manual_seed(args.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(args.device):
            model = LladaForMaskedDiffusion(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def prompt_of(args, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(args.seed)
    vocabulary = SIZES[args.size]["vocab_size"]
    return torch.randint(0, vocabulary - 200, (args.batch, length), generator=generator).to(
        args.device
    )


def public(folder: Path, model: LladaForMaskedDiffusion):
    """Fast-dLLM's model around the very tensors of ours, and its module of samplers."""
    sys.path.insert(0, str(folder.resolve()))
    module = importlib.import_module("generate")
    configuration = importlib.import_module("model.configuration_llada")
    ours = model.config.to_dict()
    fields = {
        name: ours[name]
        for name in (*model.config.attribute_map, "vocab_size", "rope_theta", "rms_norm_eps")
    }
    drops = dict(attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0)
    special = dict(mask_token_id=ours["mask_token_id"], eos_token_id=ours["eos_token_id"])
    rest = dict(
        rope_full_precision=True,
        embedding_size=ours["vocab_size"],
        pad_token_id=ours["eos_token_id"],
    )
    config = configuration.LLaDAConfig(**LLADA_NEEDS, **fields, **drops, **special, **rest)
    config.use_cache = False  # transformers 5 drops it
    theirs = module.LLaDAModelLM(config)
    weights = {}
    for name in theirs.state_dict():
        weights[name] = model.state_dict()[llama_name(name)]
    theirs.load_state_dict(weights, assign=True)
    return theirs.to(model.device).eval(), module


def module_of(file: Path):
    spec = importlib.util.spec_from_file_location("original_llada", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def samplers(args, model, ids: Tensor, new: int, cache: str, theirs) -> dict:
    """What is to be timed, by name; the ratios are to the first."""
    how = dict(gen_length=new, block_length=args.block_length, cache=CACHES[cache])
    configs = {f"ours, {soften}": DenoiseConfig(**how, soften=soften) for soften in args.soften}
    runs = {}
    if theirs is not None:
        public_model, module = theirs
        quota = dict(
            steps=new,
            gen_length=new,
            block_length=args.block_length,
            mask_id=model.config.mask_token_id,
        )
        runs["Fast-dLLM"] = lambda: getattr(module, PUBLIC[cache])(public_model, ids, **quota)
        if args.original and cache == "none":
            original = module_of(Path(args.original))
            runs["LLaDA"] = lambda: original.generate(public_model, ids, **quota)
        configs["ours, parity"] = DenoiseConfig(**how, steps=new, parity="fast_dllm")
    return runs | {
        name: (lambda c=config: denoise(model, ids, config=c)) for name, config in configs.items()
    }


def tokens(output) -> Tensor:
    """Of a DenoiseOutput, of (tokens, forwards) or of tokens."""
    return output[0] if isinstance(output, tuple) else getattr(output, "sequences", output)


def floor_ms(model: LladaForMaskedDiffusion, args) -> float:
    """What reading the weights once takes; of the input embedding a forward reads only a few
    rows."""
    embedding = model.get_input_embeddings().weight
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p is not embedding)
    block = torch.zeros(min(size, 2**30), dtype=torch.uint8, device=args.device)
    copy = torch.empty_like(block)
    took = min(interleaved({"copy": lambda: copy.copy_(block)}, 10)["copy"])
    return 1000 * took * size / (2 * len(block))  # a copy reads and writes
