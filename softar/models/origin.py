"""Where an open model comes from."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .kind import plain

ORIGIN = "softar_origin"  # attribute of a model that `load` opened


class Origin(NamedTuple):
    name: str  # as in `load`, or transformers' name_or_path
    tokenizer: PreTrainedTokenizerBase | None  # None: not known


def note_origin(model, name: str, tokenizer) -> None:
    """What `load` notes on a model that it opens."""
    vars(model)[ORIGIN] = Origin(name, tokenizer)


def origin_of(model) -> Origin:
    """Of a model, plain or wrapped by PEFT: as `note_origin` noted it, else without a tokenizer."""
    for each in (model, plain(model)):
        if ORIGIN in vars(each):
            return vars(each)[ORIGIN]
    return Origin(plain(model).name_or_path, None)
