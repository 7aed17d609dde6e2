"""The grammar of specs, `NAME:key=value,key=value`: reading and writing the options behind the
name."""

import json
import re
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
    """Reads "key=value,key=value". Raises ValueError for what has no such form, is given twice, or
    begins with a quote and is no JSON."""
    options, at = {}, 0
    while at < len(text):
        key, equals, _ = text[at:].partition("=")
        if not equals or not key.strip().isidentifier():
            wrong = text[at:].partition(",")[0]
            raise ValueError(
                f"option {wrong!r} has no form key=value; text with commas must stand in double quotes, "
                "its backslashes doubled"
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
    check_quotes(text[at:])
    word = text[at:].partition(",")[0]
    return WORDS.get(word.strip(), word.strip()), at + len(word) + 1


def check_quotes(text: str) -> None:
    """Raise ValueError for a text that is no JSON and begins with a quote, which would be part of
    the value."""
    if text[:1] not in ("'", '"'):
        return
    remedy = "take double quotes" if text[0] == "'" else "end it with a double quote"
    if "\\" in text:
        remedy = r"double its backslashes (\\d for \d)" + ", in double quotes" * (text[0] == "'")
    raise ValueError(
        f"the value {text[:80]} begins with a quote and is no JSON string: {remedy}, or leave the "
        "quotes out, which only text with commas needs"
    )


def regular_expression(pattern: str) -> re.Pattern:
    """Raises ValueError for a pattern that is none, or holds what JSON makes of a single \\b."""
    if "\b" in pattern:
        raise ValueError(
            f"pattern={pattern!r} holds a backspace: double the backslashes, or leave the quotes out"
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from None


def json_or_text(value):
    """true, null, 0.5, {"k": 5} as JSON has them, else the text itself; what is not text is
    returned as it is. Raises ValueError for text that begins with a quote and is no JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        check_quotes(value)
        return value


def lists_by_key(option: str, items: list[str]) -> dict[str, list[str]]:
    """["key=a,b"] -> {"key": ["a", "b"]}. option: how an error begins."""
    if wrong := [item for item in items if not item.partition("=")[2]]:
        raise ValueError(f"{option}{wrong[0]!r} must be key=value,value")
    return {key: values.split(",") for key, _, values in (item.partition("=") for item in items)}


# of Python, where JSON has null, true and false
WORDS = {"None": None, "True": True, "False": False}
