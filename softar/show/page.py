"""A page of traces: one HTML file that needs no network, no server and no build."""

import html
import json
import re
from importlib.resources import files
from pathlib import Path

from ..results import write_whole
from .trace import Canvas, Trace, to_json

# Of the numbers in packed mixtures: what JSON and a script around it take as it is
DIGITS = [chr(code) for code in range(35, 127) if chr(code) not in "<\\"]


def page(traces: list[Trace | Canvas], title: str = "softar") -> str:
    """Self-contained HTML of the traces, behind tabs where there are several.

    The traces are embedded as JSON: ASCII without "<", so nothing that a token holds can end the
    script around it. Weights of a canvas are rounded to thousandths, as finely as the page says
    them.
    """
    if not traces:
        raise ValueError("no traces: a page shows at least one")
    data = [pack(trace) if isinstance(trace, Canvas) else to_json(trace) for trace in traces]
    data = "[" + ",\n".join(data).replace("<", "\\u003c") + "]"
    return filled(_file("page.html"), title=escaped(title), data=data)


def filled(frame: str, **parts: str) -> str:
    """A page: its frame with {{name}} replaced by each part, HTML, and {{look}} by the style that all
    pages share."""
    parts["look"] = _file("look.css").rstrip()
    # once, so that parts may hold braces
    return re.sub(r"\{\{(" + "|".join(parts) + r")\}\}", lambda match: parts[match[1]], frame)


def escaped(text: str) -> str:
    """Text as HTML, in ASCII."""
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()


def _file(name: str) -> str:
    return files("softar.show").joinpath(name).read_text(encoding="utf-8")


def pack(canvas: Canvas) -> str:
    """JSON of a canvas as the page's script reads it. Mixtures are nearly all of it, so each is a
    text of two numbers for each token: its place in `words`, `wide` digits, and its weight in
    thousandths, 2 digits. 0 stands for the mixture that the slot had last."""
    tokens = (
        token
        for forward in canvas.forwards
        for mixture in forward.soft.values()
        for token, _ in mixture
    )
    numbers = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    wide = 2 if len(numbers) <= len(DIGITS) ** 2 else 3
    forwards, last = [], {}
    for forward in canvas.forwards:
        soft = {}
        for column, mixture in forward.soft.items():
            packed = "".join(
                _digits(numbers[token], wide) + _digits(round(1000 * w), 2) for token, w in mixture
            )
            soft[column] = 0 if last.get(column) == packed else packed
            last[column] = packed
        forwards.append({"committed": forward.committed, "soft": soft, "dropped": forward.dropped})
    whole = {
        "family": canvas.family,
        "title": canvas.title,
        "mask": canvas.mask,
        "cells": canvas.cells,
    }
    whole |= {"words": list(numbers), "wide": wide, "forwards": forwards}
    return json.dumps(whole, allow_nan=False, separators=(",", ":"))


def _digits(number: int, count: int) -> str:
    """The number, cut to what so many digits can say."""
    base = len(DIGITS)
    number = min(number, base**count - 1)
    return "".join(DIGITS[number // base**i % base] for i in reversed(range(count)))


def write_page(file: str | Path, traces: list[Trace | Canvas], title: str = "softar") -> Path:
    """Write `page` to a file, whole or not at all. -> the file."""
    return write_whole(file, page(traces, title))
