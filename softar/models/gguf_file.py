"""GGUF files, de-quantised into plain models."""

import functools
from contextlib import contextmanager

import torch
from transformers import GgufConfig

from .source import pretrained


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
        return pretrained(source, dtype=dtype, quantization_config=plain, **model_kwargs)


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
