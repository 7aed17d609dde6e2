"""Decoders by name: `make_decoder("mnns-soft-tiny=gumbel:tau=0.5,top_k=10", max_new_tokens=6)`.

A family is a module with a table DECODERS of factories, loaded when one of its names is asked for: this module imports
none of them. Also here: what kind of model a name stands for, and the check of options against a configuration.
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

from ..evals.compare import Decoder
from ..models import MODELS, folder_of

# Each has DECODERS: name -> factory(model, *, max_new_tokens, seed, trace, dtype, device, **options) -> Decoder
FAMILIES = {
    "autoregressive": "softar.decoders.soft",
    "diffusion": "softar.diffusion.decoders",
    "vllm": "softar.vllm.engine",
}
DIFFUSION_MODELS = "softar.diffusion.models"  # by name: imports point the other way
KINDS = {"autoregressive": "an autoregressive model", "diffusion": "a masked-diffusion model"}
WORDS = {"None": None, "True": True, "False": False}  # of Python, where JSON has null, true and false


@dataclasses.dataclass
class Common:
    """What every factory takes."""

    max_new_tokens: int
    seed: int
    trace: bool
    dtype: str
    device: str | None


def make_decoder(
    spec: str,
    *,
    model: str | None = None,
    max_new_tokens: int,
    seed: int = 0,
    trace: bool = False,
    dtype: str = "float32",
    device: str | None = None,
) -> Decoder:
    """The decoder of a spec, `[MODEL=]NAME[:key=value,key=value]`.

    Args:
        spec: NAME is in the DECODERS of a family; the options are fields of its configuration (SoftConfig,
            DenoiseConfig, Sampling) and knobs of its mixer or softener. Options named as the arguments below go before
            these. A model in the spec becomes part of the decoder's name.
        model: where the spec names none. Opened once for all decoders of a family.
        max_new_tokens: length of the completion; of diffusion the masks appended, 0 to fill templates.
        seed: of what the decoder draws; it keeps its generator, so that a second call draws other numbers.
        trace: keep what each answer was made of, in Decoded.trace.
        dtype, device: as for softar.load.

    Raises:
        ValueError: naming what is unknown or does not fit.
    """
    own, name, options = parse_spec(spec)
    if own is None and model is None:
        raise ValueError(f"{spec!r} names no model: write MODEL={spec}, or pass model=")
    common = dict(max_new_tokens=max_new_tokens, seed=seed, trace=trace, dtype=dtype, device=device)
    named = {key: options.pop(key) for key in common if key in options}
    common = check_options(Common, name, common | named)
    decoder = find(name)[1](own or model, **common, **options)
    if own is not None:
        decoder.name = f"{own}={decoder.name}"
    return decoder


def parse_spec(spec: str) -> tuple[str | None, str, dict]:
    """`[MODEL=]NAME[:key=value,key=value]` -> model, name, options. A value is JSON where it is, else text up to the
    next comma; text with commas is a JSON string. A model may hold ":" and "=": the first NAME that is known counts.

    Raises:
        ValueError: for a name that no family knows (the message lists them), or options that cannot be read.
    """
    starts = [-1, *(m.start() for m in re.finditer("=", spec))]
    for at in starts:
        name, _, options = spec[at + 1 :].partition(":")
        if find(name.strip()) is None:
            continue
        if at == 0:
            raise ValueError(f"{spec!r} begins with '=': write MODEL={spec[1:]}")
        return (spec[:at] if at > 0 else None), name.strip(), _options(options)
    asked = spec.partition(":")[0].rpartition("=")[2].strip()
    names = [name for family in FAMILIES for name in decoders_of(family)]
    raise ValueError(f"decoder {asked!r} is unknown{_did_you_mean(asked, names)}: choose one of {names}")


def format_options(options: dict, separator: str = ",") -> str:
    """The reverse of what follows NAME: in a spec; other separators for people to read."""
    return separator.join(f"{key}={_format(value)}" for key, value in options.items())


def _format(value) -> str:
    if isinstance(value, str):
        try:
            if _options(f"k={value}") == {"k": value}:
                return value
        except ValueError:
            pass
    return json.dumps(value)


def _options(text: str) -> dict:
    found, at = {}, 0
    while at < len(text):
        key, equals, _ = text[at:].partition("=")
        if not equals or not key.strip().isidentifier():
            wrong = text[at:].partition(",")[0]
            raise ValueError(f"option {wrong!r} has no form key=value; text with commas must stand in double quotes")
        at += len(key) + 1
        key = key.strip()
        if key in found:
            raise ValueError(f"option {key!r} is given twice")
        found[key], at = _value(text, at)
    return found


def _value(text: str, at: int) -> tuple[typing.Any, int]:
    """What begins at `at`, and where the next option does."""
    at += len(text[at:]) - len(text[at:].lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
        rest = text[end:].lstrip()
        if not rest or rest[0] == ",":
            return value, len(text) - len(rest) + 1
    except (ValueError, RecursionError):
        pass
    word = text[at:].partition(",")[0]
    return WORDS.get(word.strip(), word.strip()), at + len(word) + 1


def decoders_of(family: str) -> dict[str, Callable[..., Decoder]]:
    return import_module(FAMILIES[family]).DECODERS


def find(name: str) -> tuple[str, Callable[..., Decoder]] | None:
    """Family and factory of a decoder's name; None where no family knows it."""
    for family in FAMILIES:
        if name in (known := decoders_of(family)):
            return family, known[name]
    return None


def open_model(name: str, family: str, decoder: str, opener: Callable[[], tuple]) -> tuple:
    """Model and tokenizer from `opener()`. Raises ValueError for a model of another kind, one that cannot be opened,
    and one without a tokenizer."""
    _check_kind(family_of(name), family, decoder, f"model={name!r}")
    try:
        model, tokenizer = opener()
    except ValueError:
        _check_kind(family_of(name), family, decoder, f"model={name!r}")  # of a hub id known since this try
        raise
    if tokenizer is None:
        raise ValueError(f"model={name!r} holds no tokenizer, so there is no text to decode")
    return model, tokenizer


def check_model(model, family: str, decoder: str) -> None:
    """Raise ValueError for an open model, plain or wrapped by PEFT, of another kind than the decoder is for."""
    kind = type(plain(model)).__name__
    found = _family_of_config({"model_type": plain(model).config.model_type, "architectures": [kind]})
    _check_kind(found, family, decoder, kind)


def plain(model) -> PreTrainedModel:
    """The model itself; PEFT's wrapper holds it."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def columns_of(decoder: str, model, family: str, setting: str = "") -> dict:
    """What a decoder says of itself in a table's rows."""
    return {"decoder": decoder, "model": model.name_or_path, "setting": setting, "family": family}


def _check_kind(found: str | None, family: str, decoder: str, what: str) -> None:
    if found not in (None, family):
        raise ValueError(
            f"{what} is {KINDS[found]}, and decoder {decoder!r} needs {KINDS[family]}: give another model, or one of "
            f"the decoders {[*decoders_of(found)]}"
        )


def family_of(model: str) -> str | None:
    """The kind of model that a name stands for, as far as names and files at hand say; None: not known."""
    if model in MODELS or model.endswith(".gguf"):
        return "autoregressive"
    if model in import_module(DIFFUSION_MODELS).MODELS:
        return "diffusion"
    base = _read(model, "adapter_config.json").get("base_model_name_or_path")
    return family_of(base) if base and base != model else _family_of_config(_read(model, "config.json"))


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
    """A JSON file of a folder, or of a hub id as far as it is in the cache; {} where there is none."""
    folder = folder_of(model)
    try:
        path = folder / file if folder is not None else try_to_load_from_cache(model, file)
        return json.loads(Path(path).read_text()) if isinstance(path, (str, Path)) and Path(path).is_file() else {}
    except (OSError, ValueError):  # no hub id; what cannot be read is for `load` to say
        return {}


def check_options(config: type, decoder: str, options: dict, *, also: Iterable[str] = (), fixed=()) -> dict:
    """Options that are fields of a dataclass, or named in `also`, which are not looked at; JSON's lists as tuples.

    Raises:
        ValueError: for an option that is unknown or in `fixed`, and for a value of another type than the field's.
    """
    kinds = {f.name: f.type for f in dataclasses.fields(config) if f.name not in fixed}
    known = sorted({*kinds, *also})
    for name in options:
        if name not in known:
            raise ValueError(f"decoder {decoder!r} takes no {name!r}{_did_you_mean(name, known)}: it takes {known}")
    return {k: _fitted(decoder, k, v, kinds[k]) if k in kinds else v for k, v in options.items()}


def _fitted(decoder: str, name: str, value, kind):
    value = tuple(value) if isinstance(value, list) else value
    if not _fits(value, kind):
        raise ValueError(f"decoder {decoder!r}: {name}={value!r} must be {_say(kind)}")
    return value


def _fits(value, kind) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, k) for k in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, inner[0]) for v in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, origin or kind)


def _say(kind) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(filter(None, map(_say, typing.get_args(kind))))
    said = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    wide = {tuple: "a list of whole numbers", dict: "an object"}
    return said.get(kind) or wide.get(typing.get_origin(kind), "")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
