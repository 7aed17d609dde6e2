"""The options of a decoder's spec: reading, writing, and the check against a configuration."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable

from ..checks import did_you_mean

# of Python, where JSON has null, true and false
WORDS = {"None": None, "True": True, "False": False}


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
    found, at = {}, 0
    while at < len(text):
        key, equals, _ = text[at:].partition("=")
        if not equals or not key.strip().isidentifier():
            wrong = text[at:].partition(",")[0]
            raise ValueError(
                f"option {wrong!r} has no form key=value; text with commas must stand in double quotes"
            )
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
    known = sorted({*kinds, *also})
    for name in options:
        if name not in known:
            raise ValueError(
                f"decoder {decoder!r} takes no {name!r}{did_you_mean(name, known)}: it takes {known}"
            )
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
    said = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    wide = {tuple: "a list of whole numbers", dict: "an object"}
    return said.get(kind) or wide.get(typing.get_origin(kind), "")
