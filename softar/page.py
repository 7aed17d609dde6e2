"""A page of traces: one HTML file that needs no network, no server and no build."""

import html
import os
import re
from importlib.resources import files
from pathlib import Path

from .trace import Canvas, Trace, to_json


def page(traces: list[Trace | Canvas], title: str = "softar") -> str:
    """Self-contained HTML of the traces, behind tabs where there are several.

    The traces are embedded as JSON: ASCII without "<", so nothing that a token holds can end the script around it.
    """
    if not traces:
        raise ValueError("no traces: a page shows at least one")
    data = "[" + ",\n".join(map(to_json, traces)).replace("<", "\\u003c") + "]"
    parts = {"title": html.escape(title).encode("ascii", "xmlcharrefreplace").decode(), "data": data}
    frame = files("softar").joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|data)\}\}", lambda match: parts[match[1]], frame)  # once, so that data may hold braces


def write_page(file: str | Path, traces: list[Trace | Canvas], title: str = "softar") -> Path:
    """Write `page` to a file, whole or not at all. -> the file."""
    file = Path(file)
    draft = file.with_name(file.name + ".partial")
    draft.write_text(page(traces, title), encoding="utf-8")
    os.replace(draft, file)
    return file
