"""The options of a decoder's spec: reading, writing, and the check against a configuration."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable
from typing import ClassVar

from ..checks import did_you_mean


@dataclasses.dataclass(frozen=True)
class Common:
    """What every decoder is made with."""

    OPTIONS: ClassVar = ("max_new_tokens", "seed", "trace", "dtype", "device")  # all but the prefix

    max_new_tokens: int
    seed: int = 0
    trace: bool = False
    dtype: str = "auto"
    device: str | None = None
    prefix: str = ""  # of its name: "mnns-soft-tiny=" where the spec names a model

    def overridden(self, decoder: str, options: dict) -> "Common":
        """Changed by those of a decoder's options that are named as its fields. Raises ValueError
        for a value of another type than the field's."""
        overrides = {key: options[key] for key in self.OPTIONS if key in options}
        return Common(**check_options(Common, decoder, dataclasses.asdict(self) | overrides))

    def labels(self, decoder: str, model: str, setting: str) -> dict:
        """A decoder's name in tables, and its columns there."""
        name = self.prefix + " ".join(filter(None, [decoder, setting]))
        return {"name": name, "columns": dict(decoder=decoder, model=model, setting=setting)}


def format_options(options: dict, separator: str = ",") -> str:
    """The reverse of what follows NAME: in a spec; other separators for people to read."""
    return separator.join(f"{key}={_format(value)}" for key, value in options.items())


def _format(value) -> str:
    if isinstance(value, str):
        try:
            if parse_options(f"k={value}") == {"k": value}:
                return value
        except ValueError:
            pass
    return json.dumps(value)


def parse_options(text: str) -> dict:
    """Reads "key=value,key=value"."""
    options, at = {}, 0
    while at < len(text):
        key, equals, _ = text[at:].partition("=")
        if not equals or not key.strip().isidentifier():
            wrong = text[at:].partition(",")[0]
            raise ValueError(
                f"option {wrong!r} has no form key=value; text with commas must stand in double quotes"
            )
        at += len(key) + 1
        key = key.strip()
        if key in options:
            raise ValueError(f"option {key!r} is given twice")
        options[key], at = _value(text, at)
    return options


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


def json_or_text(value):
    """true, null, 0.5, {"k": 5} as JSON has them, else the text itself; what is not text is
    returned as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


def lists_by_key(option: str, items: list[str]) -> dict[str, list[str]]:
    """["key=a,b"] -> {"key": ["a", "b"]}. option: how an error begins."""
    if wrong := [item for item in items if not item.partition("=")[2]]:
        raise ValueError(f"{option}{wrong[0]!r} must be key=value,value")
    return {key: values.split(",") for key, _, values in (item.partition("=") for item in items)}


def check_options(
    config: type, decoder: str, options: dict, *, also: Iterable[str] = (), fixed=()
) -> dict:
    """Options that are fields of a dataclass, or named in `also`, which are not looked at; JSON's
    lists as tuples.

    Raises:
        ValueError: for an option that is unknown or in `fixed`, and for a value of another type
            than the field's.
    """
    kinds = {f.name: f.type for f in dataclasses.fields(config) if f.name not in fixed}
    names = sorted({*kinds, *also})
    for name in options:
        if name not in names:
            raise ValueError(
                f"decoder {decoder!r} takes no {name!r}{did_you_mean(name, names)}: it takes {names}"
            )
    return {k: _fitted(decoder, k, v, kinds[k]) if k in kinds else v for k, v in options.items()}


def _fitted(decoder: str, name: str, value, kind):
    value = tuple(value) if isinstance(value, list) else value
    if not _fits(value, kind):
        raise ValueError(f"decoder {decoder!r}: {name}={value!r} must be {_words(kind)}")
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


def _words(kind) -> str:
    """What a value of this type is called in an error."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(filter(None, map(_words, typing.get_args(kind))))
    return TYPES.get(origin or kind, "")


# of Python, where JSON has null, true and false
WORDS = {"None": None, "True": True, "False": False}
TYPES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    tuple: "a list of whole numbers",
    dict: "an object",
}
