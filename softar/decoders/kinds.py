"""What kind of model a name or an open model stands for."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from ..models import MODELS, folder_of, plain

DIFFUSION_MODELS = "softar.diffusion.models"  # by name: imports point the other way


KINDS = {"autoregressive": "an autoregressive model", "diffusion": "a masked-diffusion model"}


def open_model(name: str, family: str, decoder: str, opener: Callable[[], tuple]) -> tuple:
    """Model and tokenizer from `opener()`. Raises ValueError for a model of another kind, one that
    cannot be opened, and one without a tokenizer."""
    _check_kind(family_of(name), family, decoder, f"model={name!r}")
    try:
        model, tokenizer = opener()
    except ValueError:
        # of a hub id known since this try
        _check_kind(family_of(name), family, decoder, f"model={name!r}")
        raise
    if tokenizer is None:
        raise ValueError(f"model={name!r} holds no tokenizer, so there is no text to decode")
    return model, tokenizer


def check_model(model, family: str, decoder: str) -> None:
    """Raise ValueError for an open model, plain or wrapped by PEFT, of another kind than the
    decoder is for."""
    kind = type(plain(model)).__name__
    found = _family_of_config(
        {"model_type": plain(model).config.model_type, "architectures": [kind]}
    )
    _check_kind(found, family, decoder, kind)


def columns_of(decoder: str, model, family: str, setting: str = "") -> dict:
    """What a decoder says of itself in a table's rows."""
    return {"decoder": decoder, "model": model.name_or_path, "setting": setting, "family": family}


def _check_kind(found: str | None, family: str, decoder: str, what: str) -> None:
    if found not in (None, family):
        raise ValueError(
            f"{what} is {KINDS[found]}, and decoder {decoder!r} needs {KINDS[family]}: give another model, or one of "
            f"its decoders (softar compare --help lists them)"
        )


def family_of(model: str) -> str | None:
    """The kind of model that a name stands for, as far as names and files at hand say; None: not
    known."""
    if model in MODELS or model.endswith(".gguf"):
        return "autoregressive"
    if model in import_module(DIFFUSION_MODELS).MODELS:
        return "diffusion"
    base = _read(model, "adapter_config.json").get("base_model_name_or_path")
    return (
        family_of(base)
        if base and base != model
        else _family_of_config(_read(model, "config.json"))
    )


def _family_of_config(settings: dict) -> str | None:
    if settings.get("model_type") in import_module(DIFFUSION_MODELS).FAMILIES:
        return "diffusion"
    for name in settings.get("architectures") or []:
        if name.endswith("ForMaskedLM"):
            return "diffusion"
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return "autoregressive"
    return None


def _read(model: str, file: str) -> dict:
    """A JSON file of a folder, or of a hub id as far as it is in the cache; {} where there is
    none."""
    folder = folder_of(model)
    try:
        path = folder / file if folder is not None else try_to_load_from_cache(model, file)
        return (
            json.loads(Path(path).read_text())
            if isinstance(path, (str, Path)) and Path(path).is_file()
            else {}
        )
    except (OSError, ValueError):  # no hub id; what cannot be read is for `load` to say
        return {}
