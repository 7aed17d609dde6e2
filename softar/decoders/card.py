"""What a model's name stands for, answered once by `describe`, and which decoders fit its kind.

It does not stand in softar.models, which is below SoftConfig and knows no other kind of model.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

from ..config import CONFIG_FILE, SoftConfig
from ..defaults import own_config
from ..models import MODELS, diffusion_sign, fetch_config, file_of, folder_of, plain
from ..names import is_unasked_code

OTHERWISE = "if it fills masks and its folder does not say so, kind= does, e.g. kind=open_dcoder"
DIFFUSION_MODELS = "softar.diffusion.models"  # by name: imports point the other way


@dataclass(frozen=True)
class Card:
    """What is known of a model before it is opened."""

    name: str
    folder: Path | None  # where its files lie; None: not in a folder of this machine
    kind: str | None  # of KINDS; None: not known, as of a hub id that is not in the cache
    config: SoftConfig | None  # what its soft_config.json says; None where it has none
    # a decoder's own, which goes in place of code that the file names
    mixer: str | None = field(default=None, compare=False)


def describe(name: str, mixer: str | None = None) -> Card:
    """mixer: a decoder's own, which goes in place of code that the model's file names and nobody
    has asked for. Raises ValueError for a soft_config.json that cannot be read."""
    folder, kind = folder_of(name), _kind_of(name)
    config = None if kind == "diffusion" else _own_config(name, mixer)
    return Card(name, folder, kind, config, mixer)


def with_config(card: Card) -> Card:
    """With the newest soft_config.json of a hub id, for who decodes by it; others ask no hub, as the
    name may be one of a server's."""
    if card.kind == "diffusion":
        return card
    folder = fetch_config(card.name, fresh=True)
    config = card.config if folder is None else _own_config(card.name, card.mixer, folder)
    return replace(card, config=config)


def _own_config(name: str, mixer: str | None, folder: Path | None = None) -> SoftConfig | None:
    is_code = is_unasked_code(_read_json(name, CONFIG_FILE).get("mixer"))
    return own_config(name, mixer if is_code else None, folder)


def open_model(card: Card, kind: str, decoder: str, opener: Callable[[], tuple]) -> tuple:
    """Model and tokenizer from `opener()`. Raises ValueError for a model of another kind, one that
    cannot be opened, and one without a tokenizer."""
    _check_kind(card.kind, kind, decoder, f"model={card.name!r}")
    try:
        model, tokenizer = opener()
    except ValueError:
        if card.kind is None:  # of a hub id known since this try
            _check_kind(_kind_of(card.name), kind, decoder, f"model={card.name!r}")
        raise
    if tokenizer is None:
        raise ValueError(f"model={card.name!r} holds no tokenizer, so there is no text to decode")
    return model, tokenizer


def check_of_kind(model, kind: str, decoder: str) -> None:
    """Raise ValueError for an open model, plain or wrapped by PEFT, of another kind than the
    decoder is for."""
    class_name = type(plain(model)).__name__
    config = {"model_type": plain(model).config.model_type, "architectures": [class_name]}
    _check_kind(_kind_of_config(config), kind, decoder, class_name)


def columns_of(decoder: str, model, kind: str, setting: str = "") -> dict:
    """What a decoder says of itself in a table's rows."""
    return {"decoder": decoder, "model": model.name_or_path, "setting": setting, "family": kind}


def _check_kind(kind: str | None, needed: str, decoder: str, what: str) -> None:
    if kind not in (None, needed):
        hint = f"; {OTHERWISE}" if needed == "diffusion" else ""
        raise ValueError(
            f"{what} is {KINDS[kind]}, and decoder {decoder!r} needs {KINDS[needed]}: give another model, or one of "
            f"its decoders (softar compare --help lists them){hint}"
        )


def _kind_of(name: str) -> str | None:
    if name in MODELS or name.endswith(".gguf"):
        return "autoregressive"
    if name in import_module(DIFFUSION_MODELS).MODELS:
        return "diffusion"
    base = _read_json(name, "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and not _read_json(base, "adapter_config.json"):
        return _kind_of(base)
    # a plain Qwen2 that fills masks (Open-dCoder) says so in its generation_config.json alone
    mask = _read_json(name, "generation_config.json").get("mask_token_id")
    return _kind_of_config({"mask_token_id": mask} | _read_json(name, "config.json"))


def _kind_of_config(config: dict) -> str | None:
    if diffusion_sign(config):
        return "diffusion"
    classes = config.get("architectures")
    causal = ("ForCausalLM", "LMHeadModel")
    if isinstance(classes, list) and any(str(name).endswith(causal) for name in classes):
        return "autoregressive"
    return None


def _read_json(name: str, file: str) -> dict:
    """A JSON file of a folder, or of a hub id as far as it is in the cache; {} where there is
    none."""
    try:
        path = file_of(name, file)
        settings = {} if path is None else json.loads(path.read_text())
        return settings if isinstance(settings, dict) else {}
    except (OSError, ValueError, RecursionError):  # what cannot be read is for `load` to say
        return {}


KINDS = {"autoregressive": "an autoregressive model", "diffusion": "a masked-diffusion model"}
