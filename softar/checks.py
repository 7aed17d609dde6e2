"""Checks of input, each said once: one clear `ValueError` that names the value and the remedy."""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import os
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Seconds. Of several processes the first says what is wrong, and the launcher ends the others before
# they say it again.
PATIENCE = 5.0


def check_least(values, **least: float) -> None:
    """Raise ValueError unless each named value is None or at least this much.

    values: an object with such attributes, or a dict.
    """
    for name, low in least.items():
        value = values[name] if isinstance(values, dict) else getattr(values, name)
        if value is not None and not value >= low:
            raise ValueError(f"{name}={value} must be at least {low}")


def check_finite(values, *names: str) -> None:
    """Raise ValueError unless each named value is None or a finite number. values: as of `check_least`."""
    for name in names:
        value = values[name] if isinstance(values, dict) else getattr(values, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number")


def check_types(config, besides: type | None = None) -> None:
    """Raise ValueError unless each field of a dataclass holds what its annotation says. besides: a
    base of its class, whose fields are not looked at."""
    others = set() if besides is None else {field.name for field in dataclasses.fields(besides)}
    for name, kind in kinds_of(type(config)).items():
        if name not in others:
            check_value(name, getattr(config, name), kind)


@functools.cache
def kinds_of(config: type) -> dict[str, Any]:
    """Of a dataclass the annotation of each field. Not `field.type`, where parsers of command lines
    write what they make of it."""
    kinds = {}
    for each in reversed(config.__mro__):
        kinds |= vars(each).get("__annotations__", {})
    return {field.name: kinds[field.name] for field in dataclasses.fields(config)}


def check_values(function: Callable, **values) -> None:
    """Raise ValueError unless each argument of a function is what its annotation says."""
    for name, value in values.items():
        check_value(name, value, function.__annotations__[name])


def check_value(name: str, value, kind) -> None:
    if not fits(value, kind):
        more = ", of at most 64 bits" if _is_wide(value) else ""
        raise ValueError(f"{name}={shorten(repr(value), 80)} must be {words_of(kind)}{more}")


def _is_wide(value) -> bool:
    return isinstance(value, numbers.Integral) and not -(2**63) <= value < 2**63


def fits(value, kind) -> bool:
    """Is the value what the annotation says? True is no number, and 2.5 no count that may be
    rounded without a word. Of a dict the keys are looked at, of a list or tuple all that is in it."""
    origin, inner = _parts(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if kind in NUMBERS:
        is_number = isinstance(value, NUMBERS[kind]) and not isinstance(value, bool)
        return is_number and not _is_wide(value)
    if not isinstance(value, origin or kind):
        return False
    if origin in (tuple, Sequence):
        return not isinstance(value, str | bytes) and all(fits(each, inner[0]) for each in value)
    return origin is not dict or all(fits(key, inner[0]) for key in value)


@functools.cache
def _parts(kind) -> tuple:
    """Of an annotation: list[int] -> list, (int,)."""
    return typing.get_origin(kind), typing.get_args(kind)


def words_of(kind, words: Mapping | None = None) -> str:
    """What a value of that annotation is called in an error. words: by class, instead of WORDS; ""
    leaves one out."""
    (origin, inner), words = _parts(kind), WORDS if words is None else words
    if origin in (typing.Union, types.UnionType):
        each = (words_of(part, words) for part in inner)
        return " or ".join(dict.fromkeys(filter(None, each)))
    kind = origin or kind
    return words.get(kind, f"a {getattr(kind, '__name__', kind)}")


def as_ids(ids):
    """Token ids as a tuple, also of one id and of a list; anything else as it is."""
    if isinstance(ids, numbers.Integral):
        return (ids,)
    return tuple(ids) if isinstance(ids, list) else ids


def check_choice(name: str, value, known: Iterable, *, hint: str = "") -> None:
    """Raise ValueError unless `value` is among `known`. hint: what else would do."""
    known = [*known]
    if value not in known:
        raise ValueError(
            f"{name}={value!r} is unknown{did_you_mean(value, known)}: choose one of {known}{hint}"
        )


class Idle(NamedTuple):
    """Options of a configuration that do nothing while others stand as they do."""

    options: str  # their names, a space between
    when: Callable[[Any], bool]  # of the configuration's fields
    why: str  # goes on after "does nothing"
    remedy: str  # what makes them act


def fill(config, defaults: dict[str, Any]) -> set[str]:
    """Give the options of a dataclass that were left out (None) these values -> their names. For
    options that act in some modes only: one that is named where it does nothing is refused, at its
    default too, which `check_idle` could not tell otherwise."""
    left_out = {name for name in defaults if getattr(config, name) is None}
    for name in left_out:
        object.__setattr__(config, name, defaults[name])
    return left_out


def check_idle(config, rules: Iterable[Idle], left_out: set[str] = frozenset()) -> None:
    """Raise ValueError for an option of a dataclass that is away from its default and does nothing.
    left_out: from `fill`; those that do nothing are None again."""
    rules = [*rules]
    for name, *_ in [*idle_options(config, rules)]:
        if name in left_out:
            object.__setattr__(config, name, None)
    for name, value, default, rule in idle_options(config, rules):
        raise ValueError(
            f"{name}={value!r} does nothing {rule.why}: {rule.remedy}, or leave it at {default!r}"
        )


def idle_options(config, rules: Iterable[Idle]) -> Iterator[tuple[str, Any, Any, Idle]]:
    """Those that were set -> name, value, default and the rule that finds them idle."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    for rule in rules:
        for name in rule.options.split() if rule.when(config) else ():
            field, value = fields[name], getattr(config, name)
            is_made = field.default is dataclasses.MISSING
            default = field.default_factory() if is_made else field.default
            if value != default:
                yield name, value, default, rule


def check_writable(folder: str | Path, name: str = "output_dir") -> None:
    """Raise ValueError before any work where files could not be written. name: of the option."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name}={str(folder)!r} cannot be written ({error}): choose another folder"
        ) from error


def did_you_mean(value, known: Iterable) -> str:
    """ ", did you mean 'gumbel'?", or "" where nothing known is close to the value."""
    close = close_names(value, known)
    return f", did you mean {close[0]!r}?" if close else ""


def close_names(value, known: Iterable, *, most: int = 1, cutoff: float = 0.5) -> list[str]:
    """At most so many of those known that are spelled like the value, closest first; upper case or
    lower does not count."""
    names = {name.lower(): name for name in known if isinstance(name, str)}
    value = value.lower() if isinstance(value, str) else ""
    return [names[key] for key in difflib.get_close_matches(value, names, n=most, cutoff=cutoff)]


def check_fields(config: type, fields: dict, function: Callable) -> dict:
    """`fields`, which are keywords of `function`, without the zeros that some tokenizers call
    token_type_ids. config: the dataclass whose fields they are.

    Raises TypeError, as Python does, for a keyword that is no field.
    """
    segments = fields.get("token_type_ids")
    if segments is not None and any(map(any, segments.tolist())):
        raise ValueError("token_type_ids holds a second segment, and softar reads one: give zeros")
    fields = {name: value for name, value in fields.items() if name != "token_type_ids"}
    known = inspect.signature(function).parameters
    names = [field.name for field in dataclasses.fields(config)]
    if unknown := [name for name in fields if name not in names]:
        raise TypeError(
            f"{function.__name__}() got an unexpected keyword argument {unknown[0]!r}"
            f"{did_you_mean(unknown[0], known)}: it takes its own and {config.__name__}'s"
        )
    return fields


def made(kind: type, config, name: str = "config"):
    """The dataclass `kind` that an argument is, or a dict of its fields.

    Raises ValueError for anything else, and for a dict with what is no field.
    """
    known = [field.name for field in dataclasses.fields(kind) if field.repr]
    if isinstance(config, dict):
        if unknown := [field for field in config if field not in known]:
            raise ValueError(
                f"{name} has no field {unknown[0]!r}{did_you_mean(unknown[0], known)}: give those of {kind.__name__}"
            )
        return kind(**config)
    if not isinstance(config, kind):
        raise ValueError(
            f"{name}={shorten(repr(config), 80)} must be a {kind.__name__}, or a dict of its fields"
        )
    return config


@contextlib.contextmanager
def one_line_errors(program: str, kind=(ValueError, OSError), *, code: int = 2):
    """Errors of this class, or of these, end the program in one line. ValueError is for what checks
    the input: elsewhere it is a bug, and needs its traceback. OSError is the machine's: a full
    disk."""
    try:
        yield
    except kind as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(PATIENCE)
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(code)


def shorten(text: str, most: int = 300) -> str:
    """On one line, and cut where it is longer than `most` characters: for what others said."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


NUMBERS = {int: numbers.Integral, float: numbers.Real}
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    types.NoneType: "None",
    tuple: "a list of whole numbers",
    Sequence: "a list of functions",
    dict: "a dict with names as keys",
    Callable: "a function",
}
