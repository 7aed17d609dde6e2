"""Which causal models can read mixtures, and which of them rows of different lengths, or of several
examples.

tests/test_architectures.py decodes with every causal architecture of transformers and holds these
tables: what is not named here satisfies both.
"""

import importlib.metadata
import inspect

import torch
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from .kind import check_autoregressive, plain, uncompiled

# Parameters of a forward by which a model takes its state from step to step: since transformers 5.24
# all models have the first, which the old names are turned into with a warning.
CACHES = ("cache", "past_key_values", "cache_params", "state")
# What mixtures have no answer to.
NEED_TOKENS = {
    "deepseek_v4": "it chooses experts by the token's id",
    "xlm": "beside each it reads a language, and ahead of it a mask",
    "gemma3n": "its forward takes no mixtures for the layers; open it with softar.load, or as Gemma3nForCausalLM",
}
# transformers counts the positions of these from the left edge, or lets their state run over the
# padding, so that a padded row is decoded in another way than by itself.
BLIND_TO_PADDING = (
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "git",
    "marian",
    "mbart",
    "mvp",
    "pegasus",
    "plbart",
    "prophetnet",
    "recurrent_gemma",
    "roformer",
    "trocr",
    "whisper",
)
# These count positions in another way where padding is on the left, anew behind a cache, and without
# position ids from behind that of their padding
COUNT_ANEW = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
# takes, too, no more columns than it was made for, whatever is padding
NOT_MOVED = (*COUNT_ANEW, "mpt")
# PEFT puts virtual tokens before the padding, and counts positions across it.
VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
ONE_ROW = ("rwkv",)  # reads, after the prompt, the rows of a batch into each other
ONE_BY_ONE = ("prophetnet",)  # reads, after the prompt, one position at a time
# transformers keeps less in their caches than their forwards look back to
SHORT_CACHES = ("moshi",)
IN_PLACE = ("ctrl",)  # scales the embeddings that it is given, in place
# Their classes are causal whatever is_decoder says.
DECODERS = ("gpt_neox", "gpt_neox_japanese")


def check_reads_mixtures(model) -> None:
    """Raise ValueError for a model, plain or wrapped by PEFT, that is not a causal LM of
    transformers with input embeddings and a cache."""
    model = plain(model)
    name, config = type(model).__name__, model.config
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if embedding is None or config.is_encoder_decoder:
        raise ValueError(
            f"{name} is not a decoder with input embeddings: soft decoding needs a causal LM"
        )
    check_autoregressive(model)
    if "is_decoder" in config and not config.is_decoder and config.model_type not in DECODERS:
        raise ValueError(
            f"{name} reads in both directions: load it with is_decoder=True if it was trained so"
        )
    if config.model_type in NEED_TOKENS:
        raise ValueError(f"{name} cannot read mixtures: {NEED_TOKENS[config.model_type]}")
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} cannot read mixtures: its forward takes no inputs_embeds")
    if cache_name(model) is None:
        raise ValueError(f"{name} has no cache, in which soft inputs live: take another model")


def cache_name(model) -> str | None:
    """By which parameter the forward of a model, plain or wrapped by PEFT, or of a part of one takes
    its cache; None for one that has none."""
    takes = inspect.signature(plain(model).forward).parameters
    return next((name for name in CACHES if name in takes), None)


def cache_in(inputs: dict):
    """The cache among the arguments of a forward, under whichever name; None for none."""
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


def reads_on(model) -> bool:
    """Does a model, plain or wrapped by PEFT, read several positions behind a cache as it reads them
    in a whole row, with gradient? Only where that holds keys and values, and no state that is written
    over."""
    inner = plain(model)
    if cache_name(inner) not in ("cache", "past_key_values") or inner._is_stateful:
        return False
    if inner.config.model_type in (*ONE_BY_ONE, *SHORT_CACHES, *COUNT_ANEW):
        return False
    layers = DynamicCache(config=inner.config).layers
    kept = all(isinstance(layer, DynamicLayer) for layer in layers)
    return kept and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def counts_anew(model) -> bool:
    """Does a model, plain or wrapped by PEFT, read a row without position ids at others than decoding,
    where transformers counts from 0?"""
    return plain(model).config.model_type in COUNT_ANEW


def reads_moved_rows(model) -> bool:
    """Does a model, plain or wrapped by PEFT, read rows behind padding as it reads them without?"""
    blind = (*BLIND_TO_PADDING, *ONE_ROW, *NOT_MOVED)
    return plain(model).config.model_type not in blind and peft_type_of(model) not in VIRTUAL


def peft_type_of(model) -> str | None:
    return None if model is plain(model) else model.active_peft_config.peft_type


def check_virtual_tokens(model) -> None:
    """Raise ValueError for virtual tokens that PEFT would leave out while a model decodes: up to 0.21
    it looks for the cache by the name that it had before transformers 5.24."""
    model = uncompiled(model)
    if model is plain(model) or not model.active_peft_config.is_prompt_learning:
        return
    installed = importlib.metadata.version("peft")
    if cache_name(model) == "cache" and Version(installed) < Version("0.22"):
        raise ValueError(
            f"{peft_type_of(model)} by PEFT {installed} loses its virtual tokens with transformers >= 5.24: "
            "install peft >= 0.22, or 'transformers<5.24'"
        )


def check_ragged(model, attention_mask: Tensor) -> None:
    """Raise ValueError for rows [B, P] that a model, plain or wrapped by PEFT, would not decode as
    it does by themselves."""
    name, kind = type(plain(model)).__name__, plain(model).config.model_type
    tuned = peft_type_of(model)
    if tuned in VIRTUAL and not attention_mask.all():
        raise ValueError(
            f"{tuned} by PEFT does not see padding: decode rows of one length, or one by one"
        )
    if kind in ONE_ROW and len(attention_mask) > 1:
        raise ValueError(f"{name} does not keep the rows of a batch apart: decode them one by one")
    if kind in BLIND_TO_PADDING and not attention_mask.all():
        raise ValueError(f"{name} does not see padding: decode rows of one length, or one by one")


LEAK = 0.02  # of how much a model's logits differ between positions; rounding makes less
TRIED = 8  # examples of a row


@torch.no_grad()
def check_keeps_apart(model, ids: Tensor, lengths: list[int], rows: int = 1) -> None:
    """Raise ValueError for a model, plain or wrapped by PEFT, that does not read the examples of a
    packed row as it reads each alone, told by nothing but positions where they begin.

    Tried, not looked up: it depends on the model, on its attention's kernels and on the lengths.

    Args:
        ids: [T] tokens of a row; lengths: of its examples, one after the other, T in all.
        rows: of a batch, as some kernels keep the examples of one row apart, and of several not.
    """
    was_training, at = model.training, torch.arange(len(ids), device=ids.device)

    def logits(ids: Tensor, positions: Tensor) -> Tensor:  # [t], [t] -> [t, V]
        batch = {"input_ids": ids, "position_ids": positions}
        batch = {name: row.repeat(rows, 1) for name, row in batch.items()}
        return model(**batch, attention_mask=None, use_cache=False).logits[0].float()

    model.eval()
    try:
        together = logits(ids, torch.cat([at[:n] for n in lengths])).split(lengths)
        alone = [logits(part, at[: len(part)]) for part in ids.split(lengths)[:TRIED]]
    finally:
        model.train(was_training)
    off = max((a - b).abs().mean(-1).max().item() for a, b in zip(together, alone, strict=False))
    if off > LEAK * torch.cat(alone).std(0).mean().item():
        raise ValueError(
            f"packing=True: {type(plain(model)).__name__} reads the examples of a row into each other: set it to "
            "False; flash attention keeps them apart with per_device_train_batch_size=1 alone"
        )
