"""What the files of a model's folder say of its mask token, its blocks and the like, and what the
caller of `load` says where they don't."""

import json
from pathlib import Path
from typing import NamedTuple

from transformers.utils import cached_file

from .architectures import Published

GENERATION = "generation_config.json"

# Without them transformers builds a model of the sizes that it knows, however large.
SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


class Stated(NamedTuple):
    """What a caller says of a model; None leaves it to the folder, else to the family."""

    kind: str | None
    mask_token_id: int | None
    eos_token_id: int | None
    block_length: int | None
    shift: int | None


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


def mask_ids(name: str, mask_tokens: tuple[str, ...], settings: dict, fetch: dict) -> dict:
    """The id of the mask token by each file that says one. mask_tokens: as the family spells it."""
    generation = read_fields(name, GENERATION, fetch)
    said = {
        "config.json": settings.get("mask_token_id"),
        GENERATION: generation.get("mask_token_id"),
    }
    fields = read_fields(name, "tokenizer_config.json", fetch)
    own = fields.get("mask_token")
    own = own.get("content") if isinstance(own, dict) else own
    spelt = mask_tokens if own is None else (own,)
    for number, token in (fields.get("added_tokens_decoder") or {}).items():
        if token.get("content") in spelt:
            said["tokenizer_config.json"] = int(number)
    added = read_fields(name, "added_tokens.json", fetch)
    for token in (*spelt, *mask_tokens):
        said.setdefault("added_tokens.json", added.get(token))
    return {f"its {file}": number for file, number in said.items() if number is not None}


def settle(field: str, stated, said: dict, usual=None):
    """One value of a field: what the caller states, else what the files say, else the usual one.

    Raises ValueError where two of them contradict each other. said: by source.
    """
    named = said if stated is None else {"the argument": stated} | said
    if any(value != next(iter(named.values())) for value in named.values()):
        told = ", ".join(f"{value} by {source}" for source, value in named.items())
        raise ValueError(f"{field} is contradictory: {told}")
    return next(iter(named.values()), usual)


def complete(config: Published, name: str, settings: dict, stated: Stated, fetch: dict) -> None:
    """Set what a family's configuration needs and its config.json need not say. Raises ValueError
    for contradictions, a mask token outside the vocabulary, and sizes that are not there."""
    for field in SIZES:
        if not _said(settings, field, *config.originals(field)):
            raise ValueError(f"its config.json says no {field}")
    said = mask_ids(name, config.mask_tokens, settings, fetch)
    mask = settle("mask_token_id", stated.mask_token_id, said, config.usual_mask_id)
    if mask is not None and not 0 <= mask < config.vocab_size:
        raise ValueError(
            f"mask_token_id={mask} lies outside the vocabulary of {config.vocab_size}: say the right one by "
            f"mask_token_id="
        )
    config.mask_token_id = mask
    if config.usual_eos_id is not None:
        usual = config.usual_eos_id if config.pad_token_id is None else config.pad_token_id
    else:
        usual = None
    config.eos_token_id = settle(
        "eos_token_id", stated.eos_token_id, _said(settings, "eos_token_id"), usual
    )
    said = _said(settings, "logits_shift")
    if "logits_shift" not in config.free:
        said = {f"the family {config.family}": config.logits_shift}
    config.logits_shift = settle("shift", stated.shift, said, config.logits_shift)
    if "block_length" in config.free:
        said = _said(settings, "block_length", *config.originals("block_length"))
        length = settle("block_length", stated.block_length, said, config.block_length)
        if length is not None and (not isinstance(length, int) or length < 1):
            raise ValueError(f"block_length={length!r} must be a whole number, 1 or more")
        config.block_length = length
    elif stated.block_length is not None:
        raise ValueError(
            f"block_length={stated.block_length}: {config.family} reads the whole canvas in both directions"
        )


def _said(settings: dict, *fields: str) -> dict:
    return {
        f"{field} of its config.json": settings[field]
        for field in fields
        if settings.get(field) is not None
    }
