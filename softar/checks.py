"""Checks of input, each said once: one clear `ValueError` that names the value and the remedy."""

import difflib
from collections.abc import Iterable


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


def did_you_mean(value, known: Iterable) -> str:
    """ ", did you mean 'gumbel'?", or "" where nothing known is close to the value."""
    names = [name for name in known if isinstance(name, str)]
    close = (
        difflib.get_close_matches(value, names, n=1, cutoff=0.5) if isinstance(value, str) else []
    )
    return f", did you mean {close[0]!r}?" if close else ""


def shorten(text: str, most: int = 300) -> str:
    """On one line, and cut where it is longer than `most` characters: for what others said."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
