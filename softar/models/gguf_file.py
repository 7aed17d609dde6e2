"""GGUF files, de-quantised into plain models."""

import functools
from contextlib import contextmanager

import torch
from tokenizers import processors
from transformers import GgufConfig
from transformers.utils import cached_file

from .source import FETCH, pretrained


def load_gguf(source, *, dtype, **model_kwargs):
    """De-quantise a GGUF file (`gguf_file`, in the folder or hub id `source`) into a plain,
    saveable model."""
    if "quantization_config" in model_kwargs:
        raise ValueError("quantization_config=: a GGUF file is de-quantised here")
    dtype = torch.float32 if dtype == "auto" else dtype
    # Asked for by name, transformers also drops its quantiser, which would forbid saving and full
    # fine-tuning
    plain = GgufConfig(dequantize=True)
    with _read_once():
        model, tokenizer = pretrained(
            source, dtype=dtype, quantization_config=plain, **model_kwargs
        )
        metadata = _metadata(source, model_kwargs)
        _drop_invented(tokenizer, metadata["tokens"])
        _add_ends(tokenizer, metadata)
    return model, tokenizer


def _metadata(source, model_kwargs: dict) -> dict:
    """The file's fields on its tokenizer."""
    import gguf

    fetch = {key: model_kwargs[key] for key in FETCH if key in model_kwargs and key != "gguf_file"}
    path = cached_file(source, model_kwargs["gguf_file"], **fetch)
    names = ("model", "add_bos_token", "add_eos_token")
    fields = gguf.GGUFReader(path).fields
    told = {
        name: fields[key].contents()
        for name in names
        if (key := f"tokenizer.ggml.{name}") in fields
    }
    return told | {"tokens": len(fields["tokenizer.ggml.tokens"].data)}


def _drop_invented(tokenizer, count: int) -> None:
    """Special tokens that the tokenizer's class brings and the file does not have, such as Qwen's
    <|endoftext|> for padding, have ids outside the model's vocabulary."""
    for name, token in list(tokenizer.special_tokens_map.items()):
        if isinstance(token, str) and tokenizer.convert_tokens_to_ids(token) >= count:
            setattr(tokenizer, name, None)


def _add_ends(tokenizer, metadata: dict) -> None:
    """Let the tokenizer begin and end a text as the file says: transformers 5.19 reads over it, and
    without its BOS a Gemma answers nonsense.

    Where the file does not say, SentencePiece's vocabularies ("llama") begin with BOS, as in
    llama.cpp.
    """
    wanted = {
        "bos": metadata.get("add_bos_token", metadata.get("model") == "llama"),
        "eos": metadata.get("add_eos_token", False),
    }
    tokens = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    if unknown := [end for end, is_wanted in wanted.items() if is_wanted and not tokens[end]]:
        raise ValueError(f"its metadata says add_{unknown[0]}_token and names no such token")
    bos, eos = ([tokens[end]] if wanted[end] else [] for end in ("bos", "eos"))
    core = tokenizer.backend_tokenizer
    before = [part for part in [core.post_processor] if isinstance(part, processors.ByteLevel)]
    first, second = [*bos, "$A", *eos], [f"{part}:1" for part in (*bos, "$B", *eos)]
    ends = {token: tokenizer.convert_tokens_to_ids(token) for token in (*bos, *eos)}
    template = processors.TemplateProcessing(
        single=first, pair=first + second, special_tokens=[*ends.items()]
    )
    core.post_processor = processors.Sequence([*before, template])


@contextmanager
def _read_once():
    """While loading a GGUF, remember its header. transformers 5.19 parses it three times and builds
    the table of tensor names once per module, in pure Python: SmolLM2 takes 24 s to load without
    this and 9 s with it."""
    import gguf  # here, so that everything else works without it

    plain = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (functools.lru_cache(maxsize=1)(f) for f in plain)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = plain
