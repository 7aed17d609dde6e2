"""Where an open model comes from, and what opens it again."""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .kind import plain

ORIGIN = "softar_origin"  # attribute of a model that `load` opened
AGAIN = (
    *("revision", "subfolder", "gguf_file"),
    *("seed", "largest_sum"),  # of weights that are drawn
    *("kind", "mask_token_id", "eos_token_id", "block_length", "shift"),  # of softar.diffusion.load
)


class Origin(NamedTuple):
    name: str  # as in `load`, or transformers' name_or_path
    tokenizer: PreTrainedTokenizerBase | None  # None: not known
    # of a hub id that has a soft_config.json: where in the hub's cache that lies
    folder: Path | None = None
    # what `load` has to be told beside the name, by its keywords, that the same weights are opened,
    # as far as AGAIN has them; None: nothing opens them, they were made in memory
    how: dict | None = {}


def note_origin(model, name: str, tokenizer, folder: Path | None = None, how=None) -> None:
    """What `load` notes on a model that it opens. With an adapter that knows the base; the base gets
    the same name, and nothing opens it so, as the adapter may be merged into it."""
    is_adapter = plain(model) is not model
    vars(plain(model))[ORIGIN] = Origin(name, tokenizer, folder, None)
    vars(model)[ORIGIN] = Origin(name, tokenizer, folder, {} if is_adapter else how)


def note_changed(model) -> None:
    """What a training of a model's own weights notes: nothing opens these, until they are saved."""
    if plain(model) is model and ORIGIN in vars(model):
        vars(model)[ORIGIN] = vars(model)[ORIGIN]._replace(how=None)


def origin_of(model) -> Origin:
    """Of a model, plain or wrapped by PEFT: as `note_origin` noted it, else without a tokenizer."""
    for each in (model, plain(model)):
        if ORIGIN in vars(each):
            return vars(each)[ORIGIN]
    return Origin(plain(model).name_or_path, None)


def again(said: dict, *, is_drawn: bool = False) -> dict | None:
    """What opens the same weights again, as an Origin has it. said: keywords of `load`; of weights that
    are drawn all but AGAIN are fields of a configuration that lies nowhere."""
    said = {key: value for key, value in said.items() if value is not None}
    is_other = is_drawn and said.keys() - {*AGAIN, "attn_implementation"}
    return None if is_other else {key: said[key] for key in AGAIN if key in said}
