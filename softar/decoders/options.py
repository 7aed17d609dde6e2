"""The options of a decoder's spec: what all share, and the check against a configuration."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import ClassVar

from ..checks import WORDS, did_you_mean, fits, words_of
from ..feedback import StepTemperature


@dataclasses.dataclass(frozen=True)
class Common:
    """What every decoder is made with."""

    OPTIONS: ClassVar = (
        "max_new_tokens",
        "seed",
        "trace",
        "dtype",
        "device",
    )  # what a spec may say

    max_new_tokens: int | None  # None: as long as the model is decoded by default
    seed: int = 0
    trace: bool = False
    dtype: str = "auto"
    device: str | None = None
    stop: tuple[str, ...] = ()  # an answer ends with any of these
    prefix: str = ""  # of its name: "mnns-soft-tiny=" where the spec names a model
    extract: Callable[[str], str] | None = None  # a Task's: what of an answer is voted on

    def overridden(self, decoder: str, options: dict) -> "Common":
        """Changed by those of a decoder's options that are named as its fields. Raises ValueError
        for a value of another type than the field's."""
        overrides = {key: options[key] for key in self.OPTIONS if key in options}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Common(**check_options(Common, decoder, fields | overrides))

    def labels(self, decoder: str, model: str, setting: str) -> dict:
        """A decoder's name in tables, and its columns there."""
        name = self.prefix + " ".join(filter(None, [decoder, setting]))
        return {"name": name, "columns": dict(decoder=decoder, model=model, setting=setting)}


def check_options(
    config: type, decoder: str, options: dict, *, also: Iterable[str] = (), fixed=()
) -> dict:
    """Options that are fields of a dataclass, or named in `also`, which are not looked at; JSON's
    lists as tuples.

    Raises:
        ValueError: for an option that is unknown or in `fixed`, and for a value of another type
            than the field's.
    """
    fields = [f for f in dataclasses.fields(config) if f.repr]  # others are no user's
    kinds = {f.name: f.type for f in fields if f.name not in fixed}
    names = sorted({*kinds, *also})
    for name in options:
        if name not in names:
            raise ValueError(
                f"decoder {decoder!r} takes no {name!r}{did_you_mean(name, names)}: it takes {names}"
            )
    return {k: _fitted(decoder, k, v, kinds[k]) if k in kinds else v for k, v in options.items()}


def _fitted(decoder: str, name: str, value, kind):
    value = tuple(value) if isinstance(value, list) else value
    if not fits(value, kind):
        raise ValueError(f"decoder {decoder!r}: {name}={value!r} must be {words_of(kind, IN_JSON)}")
    return value


# A spec holds no function, and nothing with weights
IN_JSON = WORDS | {bool: "true or false", type(None): "null", dict: "an object"}
IN_JSON |= {Callable: "", StepTemperature: ""}
