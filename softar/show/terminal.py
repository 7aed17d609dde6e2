"""Traces and canvases drawn for the terminal."""

import math
from unicodedata import category

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .trace import Canvas, Forward, Mixture, Trace

WIDTH = 24  # characters of a bar


# of the likeliest tokens; all others share a dot, so that a bar can be read without colour
BLOCKS = "█▓▒░"


HUES = ("#6366f1", "#818cf8", "#a5b4fc", "#c7d2fe")


STYLES = {"soft": HUES[1], "latent": HUES[1], "hard": "dim", "forced": "yellow"}  # of kinds


SLOTS = 3  # soft slots whose mixtures are listed under a forward


SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


def visible(text: str, limit: int = 20) -> str:
    """A token on one line: spaces at its ends, line breaks, controls and directions as signs; long
    ones cut."""
    if not text:
        return "∅"
    core = text.strip(" ")
    left = len(text) - len(text.lstrip(" "))
    text = "␣" * left + core + "␣" * (len(text) - left - len(core))
    text = "".join(SIGNS.get(c, c if c.isprintable() else f"⟨{ord(c):X}⟩") for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


# What turns text round, and ends lines elsewhere than where it seems
TURNS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u2028", "\u2029"}


def harmless(text: str) -> str:
    """Text of a model or of its vocabulary for a terminal, which would follow what controls are in
    it (a title, the clipboard, the cursor): they are shown as signs, line breaks and tabs stay."""
    return "".join(
        f"⟨{ord(c):X}⟩" if c in TURNS or (category(c) == "Cc" and c not in "\n\t") else c
        for c in text
    )


def view(trace: Trace | Canvas) -> Group:
    """The trace for a terminal: a bar of block characters per mixture."""
    return _view_canvas(trace) if isinstance(trace, Canvas) else _view_chain(trace)


def _view_chain(trace: Trace) -> Group:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name, justify, width in (
        ("step", "right", 4),
        ("kind", "left", 6),
        ("token", "left", 10),
        ("nats", "right", 4),
    ):
        table.add_column(name, justify=justify, min_width=width, no_wrap=True)
    table.add_column("what was fed back", no_wrap=True)
    for number, step in enumerate(trace.steps, 1):
        if number == trace.answer_start + 1 > 1:
            table.add_row("", "", Text("answer", "bold italic"))
        fed = Text()
        if step.kind == "soft":
            fed = Text.assemble(bar(step.mixture, step.rest), "  ", listed(step.mixture))
        nats = "" if step.entropy is None else f"{step.entropy:.2f}"
        kind = Text(step.kind, STYLES[step.kind])
        table.add_row(str(number), kind, Text(visible(step.token), "bold"), nats, fed)
    return Group(*_heading(trace.title), Text(visible(trace.prompt, 400), "dim"), table)


def _heading(title: str) -> list[Text]:
    return [Text(visible(title, 200), "bold")] if title else []


def bar(mixture: Mixture, rest: float = 0.0, mask: str | None = None) -> Text:
    """A mixture as WIDTH characters, the shares rounded so that the whole is filled; what has no
    block of its own, the mask with it, is drawn in dots behind."""
    named = [weight for token, weight in mixture if token != mask][: len(BLOCKS)]
    total = math.fsum(weight for _, weight in mixture) + rest or 1.0
    out, done = Text(), 0
    for rank in range(len(named)):
        cells = round(WIDTH * math.fsum(named[: rank + 1]) / total) - done
        done += cells
        out.append(BLOCKS[rank] * cells, HUES[rank])
    return out.append("·" * (WIDTH - done), "dim")


def listed(mixture: Mixture, mask: str | None = None) -> Text:
    """The tokens that the bar draws in blocks, with their weights, and last the mask with its
    own."""
    named = [(visible(token, 14), weight) for token, weight in mixture if token != mask][
        : len(BLOCKS)
    ]
    masks = [("mask", weight) for token, weight in mixture if token == mask]
    out = Text()
    for token, weight in named + masks:
        if weight >= 0.005:
            out.append(token).append(f" {weight:.2f}  ", "dim")
    return out


def _view_canvas(canvas: Canvas) -> Group:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("forward", justify="right", min_width=7)
    table.add_column("canvas")
    for number, state in enumerate(canvas.states()):
        forward = canvas.forwards[number - 1] if number else Forward()
        table.add_row(str(number or ""), _cells(canvas, forward, state))
        waiting = [column for column in forward.soft if state[column][0] is None]
        for column in sorted(waiting, key=lambda c: _surest(forward.soft[c], canvas.mask))[:SLOTS]:
            mixture = forward.soft[column]
            parts = bar(mixture, mask=canvas.mask), "  ", listed(mixture, canvas.mask)
            table.add_row("", Text.assemble((f"{column:>4} ", "dim"), *parts))
        if len(waiting) > SLOTS:
            table.add_row(
                "",
                Text(f"     and {len(waiting) - SLOTS} more soft slots, surer than these", "dim"),
            )
    return Group(*_heading(canvas.title), table)


def _surest(mixture: Mixture, mask: str) -> float:
    """The weight of the likeliest token other than the mask."""
    return max((weight for token, weight in mixture if token != mask), default=0.0)


def colour_of(p: float) -> str:
    """The style of a token that was decided with probability p, from red to green."""
    return f"rgb({int(230 * (1 - p)) + 20},{int(190 * p) + 40},60)"


def _cells(canvas: Canvas, forward: Forward, state: list) -> Text:
    """One row: given cells bold, decided ones from red to green by their probability and underlined
    where new, soft slots in italics under their likeliest token, masks as dots, remasked ones as a
    sign."""
    out = Text()
    for column, (text, p) in enumerate(state):
        if text is not None:
            style = "bold" if canvas.cells[column] is not None else "dim"
            if p is not None:
                style = colour_of(p)
            out.append(
                visible(text).strip("␣"),
                style + (" underline" if column in forward.committed else ""),
            )
        elif column in forward.dropped:
            out.append("↺", "red")
        else:
            named = [token for token, _ in forward.soft.get(column, ()) if token != canvas.mask]
            out.append(visible(named[0]).strip("␣") if named else "·", "italic dim")
        out.append(" ")
    return out
