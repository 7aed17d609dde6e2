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
    tokenizer: PreTrainedTokenizerBase | None,
    fetch: dict,
) -> dict[str, int]:
    """The id of the mask token by each source that says one. settings: of config.json. Without a
    tokenizer the files that name its special tokens count."""
    generation = read_fields(name, GENERATION, fetch)
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


def complete(config: Published, masks: dict[str, int], settings: dict, stated: Stated) -> None:
    """Set what a family's configuration needs and its config.json need not say. masks: `mask_ids`.
    Raises ValueError for contradictions, and ids outside the vocabulary."""
    mask = settle("mask_token_id", stated.mask_token_id, masks, config.usual_mask_id)
    check_id("mask_token_id", mask, config.vocab_size)
    config.mask_token_id = mask
    usual = config.usual_eos_id
    if usual is not None and config.pad_token_id is not None:
        usual = config.pad_token_id
    said = _said(settings, "eos_token_id")
    end = settle("eos_token_id", stated.eos_token_id, said, usual)
    if stated.eos_token_id is not None or not said:
        check_id("eos_token_id", end, config.vocab_size)
    config.eos_token_id = end
    if "logits_shift" in config.free:
        said = _said(settings, "logits_shift")
    else:
        said = {f"the family {config.family}": config.logits_shift}
    shift = settle("shift", stated.shift, said, config.logits_shift)
    if shift not in (0, 1):
        raise ValueError(
            f"shift={shift!r} must be 0, or 1 where logits are about the next position"
        )
    config.logits_shift = shift
    if "block_length" in config.free:
        said = _said(settings, "block_length", *config.originals("block_length"))
        length = settle("block_length", stated.block_length, said, config.block_length)
        if length is not None and (type(length) is not int or length < 1):
            raise ValueError(f"block_length={length!r} must be a whole number, 1 or more")
        config.block_length = length
    elif stated.block_length is not None:
        raise ValueError(
            f"block_length={stated.block_length}: {config.family} reads the whole canvas in both directions"
        )


def check_sizes(config: type[Published], settings: dict) -> None:
    """Raise ValueError for a config.json without the sizes of its model."""
    for field in config.sizes:
        names = [*config.originals(field), field]
        if not _said(settings, *names):
            raise ValueError(f"its config.json says no {names[0]}")


def check_id(field: str, number, vocab_size: int) -> None:
    """Raise ValueError unless it is None or the id of a token."""
    if number is not None and not (type(number) is int and 0 <= number < vocab_size):
        raise ValueError(
            f"{field}={number!r} is no id in the vocabulary of {vocab_size}: say the right one by {field}="
        )


def _said(settings: dict, *fields: str) -> dict:
    return {
        f"{field} of its config.json": settings[field]
        for field in fields
        if settings.get(field) is not None
    }


def weight_names(name: str, fetch: dict) -> list[str]:
    """Of the tensors that a folder's safetensors hold; none where there are no safetensors."""
    index = "model.safetensors.index.json"
    if fields := read_fields(name, index, fetch):
        if not isinstance(fields.get("weight_map"), dict):
            raise ValueError(f"its {index} holds no weight_map")
        return [*fields["weight_map"]]
    file = find_file(name, "model.safetensors", fetch)
    if file is None:
        return []
    try:
        with safe_open(file, "pt") as tensors:
            return [*tensors.keys()]
    except SafetensorError as error:
        raise OSError(f"its {file.name} cannot be read: {error}") from None
