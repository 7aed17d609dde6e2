"""The grammar of specs, `NAME:key=value,key=value`: reading and writing the options behind the
name."""

import json
from typing import Any


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


def _value(text: str, at: int) -> tuple[Any, int]:
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


# of Python, where JSON has null, true and false
WORDS = {"None": None, "True": True, "False": False}
