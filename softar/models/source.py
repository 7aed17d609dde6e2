"""A folder or a hub id of transformers, opened safely: no remote code is run and no pickle is read."""

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .errors import check_fit
from .kind import ELSEWHERE, check_autoregressive, diffusion_sign

# What says where and how to fetch, and so concerns the tokenizer as much as the model.
FETCH = (
    "cache_dir",
    "force_download",
    "gguf_file",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# Models of text, images and sound whose text model alone reads mixtures -> the parts left out
TEXT_ALONE = {"gemma3n": ("vision_tower", "audio_tower", "embed_vision", "embed_audio")}
SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
FIXED = {
    "trust_remote_code": "softar runs no remote code",
    "use_safetensors": "softar reads no pickle",
    "weights_only": "softar reads no pickle",
    "ignore_mismatched_sizes": "softar takes only weights that fit",
    "output_loading_info": "softar returns the model and its tokenizer",
}


def pretrained(source, **model_kwargs):
    """A folder or a hub id. Raises OSError where there is none or its weights are pickled."""
    model_kwargs = cached_if_offline(source, model_kwargs)
    fetch = {key: model_kwargs[key] for key in FETCH if key in model_kwargs}
    parts = ()
    if "gguf_file" not in model_kwargs:
        settings = settings_of(source, **fetch)
        _check_causal(settings)
        parts = TEXT_ALONE.get(settings["model_type"], ())
    if parts:
        whole = AutoConfig.from_pretrained(source, trust_remote_code=False, **fetch)
        model_kwargs = {"config": whole.get_text_config(decoder=True)} | model_kwargs
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **fetch)
    # A GGUF is not looked for as safetensors
    safe = {} if "gguf_file" in model_kwargs else {"use_safetensors": True}
    model, info = AutoModelForCausalLM.from_pretrained(
        source,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **safe,
        **model_kwargs,
    )
    left_out = tuple(f"model.{part}." for part in parts)
    info["unexpected_keys"] = [
        key for key in info["unexpected_keys"] if not key.startswith(left_out)
    ]
    check_fit(info, model)
    check_autoregressive(model, ELSEWHERE)  # generation_config.json may name a mask token too
    return model, tokenizer


def cached_if_offline(source: str | os.PathLike, model_kwargs: dict) -> dict:
    """The keywords of from_pretrained; of a hub id, where the hub has no address here, those that
    look into the cache alone: the retries would take a minute to say so."""
    if os.path.isdir(source) or "local_files_only" in model_kwargs or getproxies():
        return model_kwargs
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return model_kwargs | {"local_files_only": True}
    return model_kwargs


def settings_of(source: str | os.PathLike, **fetch) -> dict:
    """The fields of config.json, "model_type" (a text or None) and "architectures" (texts) among
    them.

    Raises ValueError for one of no sense that transformers would build a model of, or trip over.
    """
    settings, _ = PreTrainedConfig.get_config_dict(source, **fetch)
    if not isinstance(settings, dict):
        raise ValueError(f"its config.json holds {settings!r} instead of fields")
    kind, classes = settings.get("model_type"), settings.get("architectures") or []
    if not isinstance(kind, str | None):
        raise ValueError(f"its config.json says model_type={kind!r}, which is no text")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(
            f"its config.json says architectures={classes!r}, which is no list of texts"
        )
    for field in SIZES:
        size = settings.get(field)
        if isinstance(size, int) and size < 1:
            raise ValueError(f"its config.json says {field}={size}, which must be at least 1")
    return settings | {"model_type": kind, "architectures": classes}


def _check_causal(settings: dict) -> None:
    """Raise ValueError for the config.json of anything but a causal language model."""
    if sign := diffusion_sign(settings):
        raise ValueError(
            f"its config.json says {sign}, so it is a masked-diffusion model: {ELSEWHERE}"
        )
    kind = settings["model_type"]
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"its config.json says model_type={kind!r}, which is not a causal language model of transformers: if it is "
            f"a masked-diffusion model, {ELSEWHERE}"
        )


def check_fixed(model_kwargs: dict, **more: str) -> None:
    """Raise ValueError for what `from_pretrained` takes and softar decides. more: besides FIXED."""
    fixed = FIXED | more
    for name in sorted(fixed.keys() & model_kwargs.keys()):
        raise ValueError(f"{name}={model_kwargs[name]!r} is not to be changed: {fixed[name]}")
