"""What the files of a model's folder say of its mask token, its blocks and the like, and what the
caller of `load` says where they don't."""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from .architectures import Published

GENERATION = "generation_config.json"
# What the length of blocks is called in config.json, by this family or that
LENGTHS = ("block_length", "block_size", "bd_size")


class Stated(NamedTuple):
    """What a caller says of a model; None leaves it to the folder, else to the family."""

    kind: str | None
    mask_token_id: int | None
    eos_token_id: int | None
    block_length: int | None
    shift: int | None


# Beside the options of a decode, whose block_length cuts a canvas into pieces, what is said of the
# model: option -> argument of `load`
STATED = {name: name for name in Stated._fields if name != "block_length"}
STATED |= {"model_block_length": "block_length"}


def split_stated(options: dict) -> tuple[dict, dict]:
    """Options by name -> those that say what the folder does not, as arguments of `load`; the
    others."""
    stated = {STATED[name]: value for name, value in options.items() if name in STATED}
    return stated, {name: value for name, value in options.items() if name not in STATED}


def find_file(name: str, file: str, fetch: dict) -> Path | None:
    """A file of a folder or a hub id; None where there is none."""
    if Path(name).is_dir():
        path = Path(name, fetch.get("subfolder", ""), file)
        return path if path.is_file() else None
    path = cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **fetch,
    )
    return None if path is None else Path(path)


def read_fields(name: str, file: str, fetch: dict) -> dict:
    """The fields of a JSON file; none where there is no such file."""
    path = find_file(name, file, fetch)
    if path is None:
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"its {file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"its {file} holds {fields!r} instead of fields")
    return fields


def mask_ids(
    name: str,
    config: Published,
    settings: dict,
    generation: dict,
    tokenizer: PreTrainedTokenizerBase | None,
    fetch: dict,
) -> dict[str, int]:
    """The id of the mask token by each source that says one. settings, generation: of config.json
    and generation_config.json. Without a tokenizer the files that name its special tokens count."""
    said = {
        "its config.json": settings.get("mask_token_id"),
        f"its {GENERATION}": generation.get("mask_token_id"),
    }
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        spelt = [vocabulary[token] for token in config.mask_tokens if token in vocabulary]
        said["its tokenizer"] = tokenizer.mask_token_id
        if tokenizer.mask_token_id is None and spelt:
            said["its tokenizer"] = spelt[0]
    else:
        fields = read_fields(name, "tokenizer_config.json", fetch)
        own = fields.get("mask_token")
        own = own.get("content") if isinstance(own, dict) else own
        spelt = config.mask_tokens if own is None else (own,)
        listed = fields.get("added_tokens_decoder")
        for number, token in listed.items() if isinstance(listed, dict) else ():
            if isinstance(token, dict) and token.get("content") in spelt:
                said["its tokenizer_config.json"] = int(number)
        added = read_fields(name, "added_tokens.json", fetch)
        numbers = [added[token] for token in spelt if token in added]
        said["its added_tokens.json"] = next(iter(numbers), None)
    return {source: number for source, number in said.items() if number is not None}


def settle(field: str, stated, said: dict, usual=None):
    """One value of a field: what the caller states, else what the files say, else the usual one.

    Raises ValueError where two of them contradict each other. said: by source.
    """
    named = said if stated is None else {"the argument": stated} | said
    if any(value != next(iter(named.values())) for value in named.values()):
        told = ", ".join(f"{value!r} by {source}" for source, value in named.items())
        raise ValueError(f"{field} is contradictory: {told}")
    return next(iter(named.values()), usual)


def complete(
    config: Published,
    masks: dict[str, int],
    settings: dict,
    generation: dict,
    tokenizer: PreTrainedTokenizerBase | None,
    stated: Stated,
) -> None:
    """Set what a family's configuration needs and its config.json need not say. masks, settings,
    generation: as in `mask_ids`. Raises ValueError for contradictions, and ids outside the
    vocabulary."""
    config.is_causal = False
    usual = config.usual_mask_id
    mask = settle("mask_token_id", stated.mask_token_id, masks, usual)
    if stated.mask_token_id is None and not masks and usual is not None and tokenizer is not None:
        if (word := tokenizer.convert_ids_to_tokens(usual)) is not None:
            raise ValueError(
                f"none of its files names a mask token, and mask_token_id={usual} of the released models is "
                f"{word!r} to its tokenizer: say the right one by mask_token_id="
            )
    check_id("mask_token_id", mask, config.vocab_size)
    config.mask_token_id = mask
    usual = config.usual_eos_id
    if usual is not None and config.pad_token_id is not None:
        usual = config.pad_token_id
    config.eos_token_id = settle(
        "eos_token_id", stated.eos_token_id, _said(settings, "eos_token_id"), usual
    )
    for named in (config.eos_token_id, generation.get("eos_token_id")):
        for end in named if isinstance(named, list) else [named]:
            check_id("eos_token_id", end, config.vocab_size)
            if mask is not None and end == mask:
                raise ValueError(
                    f"mask_token_id={mask} is an end token as well: one of them is wrong"
                )
    if "logits_shift" in config.free:
        said = _said(settings, "logits_shift")
    else:
        said = {f"the family {config.family}": config.logits_shift}
    config.logits_shift = settle("shift", stated.shift, said, config.logits_shift)
    said = _said(settings, *LENGTHS)
    length = settle("block_length", stated.block_length, said, config.block_length)
    if length is not None and "block_length" not in config.free:
        raise ValueError(
            f"block_length={length}: {config.family} reads the whole canvas in both directions"
        )
    config.block_length = length
    check_reading(config.logits_shift, config.block_length)


def check_reading(shift, block_length) -> None:
    """Raise ValueError for what no model is."""
    if shift not in (0, 1):
        raise ValueError(
            f"shift={shift!r} must be 0, or 1 where logits are about the next position"
        )
    if block_length is not None and (type(block_length) is not int or block_length < 1):
        raise ValueError(f"block_length={block_length!r} must be a whole number, 1 or more")


def check_sizes(config: type[Published], settings: dict) -> None:
    """Raise ValueError for a config.json without the sizes of its model, or with two of one."""
    rotation = settings.get("rope_parameters")
    for field in config.sizes:
        names = [field, *config.originals(field)]
        said = _said(settings, *names)
        if isinstance(rotation, dict) and rotation.get(field) is not None:
            said[f"{field} of the rope_parameters of its config.json"] = rotation[field]
        if not said:
            raise ValueError(f"its config.json says no {names[-1]}")
        settle(field, None, said)


def check_id(field: str, number, vocab_size: int) -> None:
    """Raise ValueError unless it is None or the id of a token."""
    if number is not None and not (type(number) is int and 0 <= number < vocab_size):
        raise ValueError(
            f"{field}={number!r} is no id in the vocabulary of {vocab_size}: say the right one in the file that says "
            f"this one, or by {field}= where none does"
        )


def _said(settings: dict, *fields: str) -> dict:
    return {
        f"{field} of its config.json": settings[field]
        for field in fields
        if settings.get(field) is not None
    }


def weight_names(name: str, fetch: dict, variant: str | None) -> list[str]:
    """Of the tensors that a folder's safetensors hold; none where there are no safetensors.
    variant: as in `from_pretrained`, a word in the names of the files."""
    middle = f".{variant}" if variant else ""
    files, index = [f"model{middle}.safetensors"], f"model.safetensors.index{middle}.json"
    if find_file(name, files[0], fetch) is None:
        fields = read_fields(name, index, fetch)
        where = fields.get("weight_map") if fields else {}
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise ValueError(f"its {index} holds no weight_map")
        files = sorted({*where.values()})
    names = []
    for file in files:
        if (path := find_file(name, file, fetch)) is None:
            raise FileNotFoundError(f"its {file} is not there")
        try:
            with safe_open(path, "pt") as tensors:
                names += tensors.keys()
        except SafetensorError as error:
            raise OSError(f"its {file} cannot be read: {error}") from None
    return names
