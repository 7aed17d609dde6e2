"""The public loops that bench_block.py runs beside softar's, from the files of their authors, over
softar's model.

Shapes: B rows, W positions of a forward.
"""

import ast
import importlib.util
import sys
import types
from pathlib import Path

import torch
from transformers import DynamicCache

from softar.diffusion.net import parts


class Reread(DynamicCache):
    """Keys and values to read, which a forward does not add to."""

    def __init__(self, kept: DynamicCache):
        self.kept, self.layers = kept, kept.layers

    def update(self, keys, values, layer, *args, **kwargs):
        if layer >= len(self.kept.layers) or not self.kept.layers[layer].is_initialized:
            return keys, values
        stored = self.kept.layers[layer]
        return torch.cat([stored.keys, keys], -2), torch.cat([stored.values, values], -2)

    def get_seq_length(self, layer_idx=0):
        return self.kept.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length, layer):
        return self.kept.get_seq_length(layer) + query_length, 0


class Around(Reread):
    """The same, and a block's own, of which a forward of a part of it renews that part."""

    def __init__(self, kept: DynamicCache, block: dict | None, lo: int):
        super().__init__(kept)
        self.block, self.lo = {} if block is None else block, lo

    def update(self, keys, values, layer, *args, **kwargs):
        both = self.block.setdefault(layer, (keys, values))
        for whole, new in zip(both, (keys, values), strict=True):
            whole[:, :, self.lo : self.lo + new.shape[2]] = new
        return super().update(*both, layer)

    def get_mask_sizes(self, query_length, layer):
        return self.kept.get_seq_length(layer) + self.block[0][0].shape[2], 0


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


class CalledFast(Called):
    """softar's model, as the self of Fast-dLLM v2's generate."""

    def __init__(self, model, methods: dict):
        super().__init__(model)
        for name, method in methods.items():
            setattr(self, name, types.MethodType(method, self))

    def forward(
        self,
        input_ids,
        use_cache,
        past_key_values=None,
        update_past_key_values=False,
        block_size=32,
        use_block_cache=False,
        block_past_key_values=None,
        replace_position=None,
    ):
        kept = DynamicCache() if past_key_values is None else past_key_values
        cache, lo = kept, kept.get_seq_length() + (replace_position or 0)
        if use_block_cache:
            cache = Around(kept, block_past_key_values, replace_position or 0)
        elif not update_past_key_values:
            cache = Reread(kept)
        at = torch.arange(lo, lo + input_ids.shape[1])
        seen = None
        if replace_position is None:
            seen = (torch.arange(len(at) + lo) // block_size <= at[:, None] // block_size)[
                None, None
            ]
        hidden = self.net.body(self.net.embedding(input_ids), seen, at[None], cache)
        return types.SimpleNamespace(
            logits=self.net.head(hidden),
            past_key_values=kept,
            block_past_key_values=cache.block if use_block_cache else None,
        )


def fast_loop(folder: Path, model, args, ids, **how):
    """Fast-dLLM v2's own loop: its methods alone, since what the file imports is not all here."""
    tree = ast.parse((folder / "modeling.py").read_text())
    (net,) = [n for n in tree.body if getattr(n, "name", "") == "Fast_dLLM_QwenForCausalLM"]
    wanted = [n for n in net.body if getattr(n, "name", "") in ("generate", "sample_with_top_p")]
    for method in wanted:
        method.decorator_list.clear()
    names = {"torch": torch, "F": torch.nn.functional}
    exec(compile(ast.Module(wanted, []), str(folder / "modeling.py"), "exec"), names)
    called = CalledFast(model, {method.name: names[method.name] for method in wanted})
    settings = dict(
        mask_id=model.config.mask_token_id,
        stop_token=-1,
        block_size=args.block_length,
        small_block_size=args.sub_block_length,
    )
    return torch.no_grad()(lambda: called.generate(ids, args.new_tokens, **settings, **how))


def sdar_loop(folder: Path, model, args, ids):
    """SDAR's own, greedy, from left to right."""
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
