"""Checks of input, each said once: one clear `ValueError` that names the value and the remedy."""

import contextlib
import dataclasses
import difflib
import inspect
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

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


def check_choice(name: str, value, known: Iterable, *, hint: str = "") -> None:
    """Raise ValueError unless `value` is among `known`. hint: what else would do."""
    known = [*known]
    if value not in known:
        raise ValueError(
            f"{name}={value!r} is unknown{did_you_mean(value, known)}: choose one of {known}{hint}"
        )


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


def override(config, fields: dict, function: Callable):
    """The dataclass `config` with `fields` in place of its own, which are keywords of `function`.
    The zeros that some tokenizers call token_type_ids are dropped.

    Raises TypeError, as Python does, for a keyword that is not a field.
    """
    segments = fields.get("token_type_ids")
    if segments is not None and any(map(any, segments.tolist())):
        raise ValueError("token_type_ids holds a second segment, and softar reads one: give zeros")
    fields = {name: value for name, value in fields.items() if name != "token_type_ids"}
    names = [field.name for field in dataclasses.fields(config)]
    if unknown := [name for name in fields if name not in names]:
        known = inspect.signature(function).parameters
        raise TypeError(
            f"{function.__name__}() got an unexpected keyword argument {unknown[0]!r}"
            f"{did_you_mean(unknown[0], known)}: it takes its own and {type(config).__name__}'s"
        )
    return dataclasses.replace(config, **fields)


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
