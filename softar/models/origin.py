"""Where an open model comes from."""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .kind import plain

ORIGIN = "softar_origin"  # attribute of a model that `load` opened


class Origin(NamedTuple):
    name: str  # as in `load`, or transformers' name_or_path
    tokenizer: PreTrainedTokenizerBase | None  # None: not known
    # of a hub id that has a soft_config.json: where in the hub's cache that lies
    folder: Path | None = None


def note_origin(model, name: str, tokenizer, folder: Path | None = None) -> None:
    """What `load` notes on a model that it opens."""
    vars(model)[ORIGIN] = Origin(name, tokenizer, folder)


def origin_of(model) -> Origin:
    """Of a model, plain or wrapped by PEFT: as `note_origin` noted it, else without a tokenizer."""
    for each in (model, plain(model)):
        if ORIGIN in vars(each):
            return vars(each)[ORIGIN]
    return Origin(plain(model).name_or_path, None)
