"""What every loader says of a model that cannot be opened: one line that names it."""

import logging
import re
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..checks import shorten

logger = logging.getLogger("softar")
# Of the value heads of TRL and of others, beside the weights of the policy
EXTRAS = re.compile(r"(v_head|value_head)\.")
UNKNOWN = re.compile(r"__init__\(\) got an unexpected keyword argument '(\w+)'")


@contextmanager
def opening(name: str, remedy: str = "", keywords: Collection[str] = ()) -> Iterator[None]:
    """Whatever a library raises inside over a damaged file is a ValueError that names the model.

    Out of memory and mistakes in softar's own lines come through as they are.

    Args:
        remedy: ends the line; what could be given instead.
        keywords: what the caller gave for from_pretrained; one that nobody takes is named.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        is_plain = isinstance(error, (OSError, ValueError))
        if not is_plain and _raised_in(error).split(".")[0] == "softar":
            raise
        said = str(error) if is_plain else f"{type(error).__name__}: {error}"
        unknown = UNKNOWN.search(said)
        if unknown and unknown[1] in keywords:
            raise ValueError(f"model={name!r} takes no keyword {unknown[1]!r}") from error
        if pickles := _pickled(name):
            said = f"its weights are pickled, {pickles[0]}: save the model as safetensors"
        raise ValueError(f"model={name!r} could not be loaded: {shorten(said)}{remedy}") from error


def _pickled(folder: str) -> list[str]:
    """Files of weights in a folder that has them as pickles alone."""
    names = [file.name for file in Path(folder).glob("*")]
    if any(name.endswith(".safetensors") for name in names):
        return []
    return sorted(n for n in names if re.fullmatch(r"(pytorch|adapter)_model.*\.bin", n))


def _raised_in(error: Exception) -> str:
    """The module whose line raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"]


def check_fit(loading_info: dict, model: PreTrainedModel, *, is_head_of_many: bool = False) -> None:
    """Raise ValueError unless the weights of a checkpoint are those of its configuration's model:
    what is missing would be drawn at random, what is left over dropped.

    Args:
        loading_info: what from_pretrained returns with output_loading_info=True and
            ignore_mismatched_sizes=True (without which it raises and does not say the names).
        is_head_of_many: the checkpoint may carry other heads (BERT's); only what is left over of
            the model's own kinds of layers counts.

    What is known to be no part of a language model (EXTRAS) is left out, and said so.
    """
    wrong = {
        kind: sorted(loading_info[f"{kind}_keys"], key=str)
        for kind in ("missing", "mismatched", "unexpected")
    }
    extras = [key for key in wrong["unexpected"] if EXTRAS.match(key)]
    wrong["unexpected"] = [key for key in wrong["unexpected"] if key not in extras]
    if is_head_of_many:
        kinds = {_numberless(name) for name in model.state_dict()}
        wrong["unexpected"] = [key for key in wrong["unexpected"] if _numberless(key) in kinds]
    told = [f"{kind} keys {_listed(keys)}" for kind, keys in wrong.items() if keys]
    if told:
        raise ValueError(f"its weights do not fit its config.json: {', '.join(told)}")
    if extras:
        logger.warning(
            "%s: its %s, a value head of RL, is left out", model.name_or_path, _listed(extras)
        )


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _listed(keys: list) -> str:
    """Three of them; a mismatched one with the shape stored and the shape wanted."""
    names = [
        repr(key) if isinstance(key, str) else f"{key[0]!r} ({list(key[1])} for {list(key[2])})"
        for key in keys
    ]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
