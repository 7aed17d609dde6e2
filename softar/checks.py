"""Checks of input, each said once: one clear `ValueError` that names the value and the remedy."""

import contextlib
import dataclasses
import difflib
import inspect
import numbers
import os
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator
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


def check_types(config) -> None:
    """Raise ValueError unless each field of a dataclass that is annotated as int, float or bool (or
    None) holds one: True is no number, and 2.5 no count that may be rounded without a word."""
    for field in dataclasses.fields(config):
        kinds, value = {*(typing.get_args(field.type) or [field.type])}, getattr(config, field.name)
        if not kinds <= TYPES.keys() or (value is None and types.NoneType in kinds):
            continue
        fits = not isinstance(value, bool) and any(isinstance(value, TYPES[k][0]) for k in kinds)
        if not (isinstance(value, bool) if bool in kinds else fits):
            words = " or ".join(TYPES[kind][1] for kind in kinds if kind is not types.NoneType)
            none = " or None" if types.NoneType in kinds else ""
            raise ValueError(f"{field.name}={value!r} must be {words}{none}")


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


def check_idle(config, rules: Iterable[Idle]) -> None:
    """Raise ValueError for an option of a dataclass that is away from its default and does
    nothing."""
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


def check_writable(folder: str | Path) -> None:
    """Raise ValueError before any work where checkpoints could not be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir={str(folder)!r} cannot be written ({error}): choose another folder"
        ) from error


def did_you_mean(value, known: Iterable) -> str:
    """ ", did you mean 'gumbel'?", or "" where nothing known is close to the value."""
    names = [name for name in known if isinstance(name, str)]
    close = (
        difflib.get_close_matches(value, names, n=1, cutoff=0.5) if isinstance(value, str) else []
    )
    return f", did you mean {close[0]!r}?" if close else ""


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


def override(config, fields: dict, function: Callable):
    """The dataclass `config` with `fields` in place of its own, see `check_fields`."""
    return dataclasses.replace(config, **check_fields(type(config), fields, function))


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


TYPES = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    types.NoneType: (types.NoneType, "None"),
}
