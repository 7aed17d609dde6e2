"""What a decode believed, step by step, as plain data: for the page, for the terminal, as JSON.

Two families. A `Trace` is a chain of steps, each with the mixture that was fed back. A `Canvas` is a row of cells that
forwards fill. Both hold text and numbers only: no tensors, and nothing that needs the model or the tokenizer again.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from ..decode import SoftOutput

TOP = 10  # candidates of a mixture that are kept
MANY = 256  # slots of a mixture that are looked at one by one; wider ones are whole distributions, without repeats
Mixture = list[tuple[str, float]]  # tokens and weights, heaviest first


@dataclass(frozen=True)
class Step:
    """One step of an autoregressive decode."""

    kind: str  # "soft": the mixture was fed back; "hard": one token, the model's choice; "forced": one, put by a rule
    token: str  # stands for the step in the text
    entropy: float | None  # nats, of the model's distribution; None where not known
    mixture: Mixture  # what was fed back, at most TOP tokens; of a hard step its one token
    rest: float = 0.0  # weight of the tokens that are not listed
    others: int = 0  # how many those are


@dataclass(frozen=True)
class Trace:
    """An autoregressive decode of one prompt."""

    prompt: str
    steps: list[Step]
    title: str = ""
    answer_start: int = 0  # steps before the answer begins; 0 where there is no separate thought
    family: str = "autoregressive"


@dataclass(frozen=True)
class Forward:
    """What one forward of a diffusion model did to the canvas; the keys are columns, from 0."""

    # What it decided, and the probability that had; None: filled in by a rule (behind an end of text)
    committed: dict[int, tuple[str, float | None]] = field(default_factory=dict)
    # What slots show in the next forward; the mask is listed under the canvas's `mask`. Weights need not sum to 1
    soft: dict[int, Mixture] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)  # went back to the mask


@dataclass(frozen=True)
class Canvas:
    """A masked-diffusion decode of one row, padding left out."""

    cells: list[str | None]  # what was given; None: to be filled
    forwards: list[Forward]
    title: str = ""
    mask: str = "<mask>"  # the mask token's text, as it stands in the mixtures
    family: str = "diffusion"

    def states(self) -> Iterator[list[tuple[str | None, float | None]]]:
        """The canvas before the first forward and after each: per cell its text, None for a mask, and the probability
        that it had when it was decided, None where none decided it."""
        now = [(text, None) for text in self.cells]
        yield now
        for forward in self.forwards:
            now = list(now)
            for column in forward.dropped:
                now[column] = (None, None)
            for column, decided in forward.committed.items():
                now[column] = decided
            yield now


class Words:
    """The text of single tokens, special ones included."""

    def __init__(self, tokenizer):
        self.tokenizer, self.known = tokenizer, {}

    def __getitem__(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self.tokenizer.decode([token])
        return self.known[token]

    def mixtures(self, ids: "Tensor", weights: "Tensor", top: int) -> Iterator[tuple[Mixture, float, int]]:
        """[n, K] -> of each row the `top` heaviest tokens, the weight of the others, and how many those are. A token
        that was drawn more than once counts once, with all its weight; weights of 0 are padding."""
        heavy, order = weights.topk(min(MANY, weights.shape[-1]), dim=-1)
        lost_count = (weights > 0).sum(-1) - (heavy > 0).sum(-1)
        lost = (weights.double().sum(-1) - heavy.double().sum(-1)).where(lost_count > 0, 0.0)
        rows = (ids.gather(-1, order).tolist(), heavy.tolist(), lost.tolist(), lost_count.tolist())
        for tokens, theirs, rest, others in zip(*rows, strict=True):
            total: dict[int, float] = {}
            for token, weight in zip(tokens, theirs, strict=True):
                if weight > 0:
                    total[token] = total.get(token, 0.0) + weight
            ranked = sorted(total.items(), key=lambda pair: -pair[1])
            behind = [weight for _, weight in ranked[top:]]
            listed = [(self[token], weight) for token, weight in ranked[:top]]
            yield listed, math.fsum(behind) + rest, len(behind) + others


def thought(out: "SoftOutput", tokenizer, row: int = 0, top: int = TOP, title: str = "") -> Trace:
    """The trace of one row of what `softar.generate` returns, with the `top` likeliest tokens of each mixture."""
    from ..decode import Kind  # here, so that a trace can be read and shown without torch

    words, record = Words(tokenizer), out.record
    columns = (column[row].tolist() for column in (record.kind, record.token, record.entropy))
    mixtures = words.mixtures(record.ids[row], record.weights[row], top)
    steps = []
    for kind, token, nats, mixture in zip(*columns, mixtures, strict=True):
        if kind != Kind.PAD:  # at the end only
            nats = nats if math.isfinite(nats) else None
            steps.append(Step(Kind(kind).name.lower(), words[token], nats, *mixture))
    prompt = tokenizer.decode(out.sequences[row, : out.prompt_length], skip_special_tokens=False)
    return Trace(prompt, steps, title, min(int(out.answer_start[row]), len(steps)))


def to_json(trace: Trace | Canvas) -> str:
    """One line of ASCII."""
    return json.dumps(dataclasses.asdict(trace), allow_nan=False, separators=(",", ":"))


def from_json(text: str) -> Trace | Canvas:
    """What `to_json` wrote. Raises ValueError for anything else."""
    try:
        data = json.loads(text)
        family = data["family"]
        if family == "autoregressive":
            steps = [Step(**step | {"mixture": _pairs(step["mixture"])}) for step in data["steps"]]
            return Trace(**data | {"steps": steps})
        if family == "diffusion":
            return Canvas(**data | {"forwards": [_forward(**forward) for forward in data["forwards"]]})
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"this is no trace: {error!r}; read what softar.show.trace.to_json wrote") from None
    raise ValueError(f"family={family!r} is unknown: a trace is 'autoregressive' or 'diffusion'")


def _forward(committed: dict, soft: dict, dropped: list) -> Forward:
    return Forward(
        {int(column): tuple(decided) for column, decided in committed.items()},
        {int(column): _pairs(mixture) for column, mixture in soft.items()},
        dropped,
    )


def _pairs(mixture: list) -> Mixture:
    return [(token, weight) for token, weight in mixture]


# The terminal view

WIDTH = 24  # characters of a bar
BLOCKS = "█▓▒░"  # of the likeliest tokens; all others share a dot, so that a bar can be read without colour
HUES = ("#6366f1", "#818cf8", "#a5b4fc", "#c7d2fe")
SLOTS = 3  # soft slots whose mixtures are listed under a forward
SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


def visible(text: str, limit: int = 20) -> str:
    """A token on one line: spaces at its ends, line breaks, controls and directions as signs; long ones cut."""
    if not text:
        return "∅"
    core = text.strip(" ")
    left = len(text) - len(text.lstrip(" "))
    text = "␣" * left + core + "␣" * (len(text) - left - len(core))
    text = "".join(SIGNS.get(c, c if c.isprintable() else f"⟨{ord(c):X}⟩") for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


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
        kind = Text(step.kind, {"soft": HUES[1], "hard": "dim", "forced": "yellow"}[step.kind])
        table.add_row(str(number), kind, Text(visible(step.token), "bold"), nats, fed)
    return Group(*_heading(trace.title), Text(visible(trace.prompt, 400), "dim"), table)


def _heading(title: str) -> list[Text]:
    return [Text(visible(title, 200), "bold")] if title else []


def bar(mixture: Mixture, rest: float = 0.0, mask: str | None = None) -> Text:
    """A mixture as WIDTH characters, the shares rounded so that the whole is filled; what has no block of its own, the
    mask with it, is drawn in dots behind."""
    named = [weight for token, weight in mixture if token != mask][: len(BLOCKS)]
    total = math.fsum(weight for _, weight in mixture) + rest or 1.0
    out, done = Text(), 0
    for rank in range(len(named)):
        cells = round(WIDTH * math.fsum(named[: rank + 1]) / total) - done
        done += cells
        out.append(BLOCKS[rank] * cells, HUES[rank])
    return out.append("·" * (WIDTH - done), "dim")


def listed(mixture: Mixture, mask: str | None = None) -> Text:
    """The tokens that the bar draws in blocks, with their weights, and last the mask with its own."""
    named = [(visible(token, 14), weight) for token, weight in mixture if token != mask][: len(BLOCKS)]
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
            shown = bar(mixture, mask=canvas.mask), "  ", listed(mixture, canvas.mask)
            table.add_row("", Text.assemble((f"{column:>4} ", "dim"), *shown))
        if len(waiting) > SLOTS:
            table.add_row("", Text(f"     and {len(waiting) - SLOTS} more soft slots, surer than these", "dim"))
    return Group(*_heading(canvas.title), table)


def _surest(mixture: Mixture, mask: str) -> float:
    """The weight of the likeliest token other than the mask."""
    return max((weight for token, weight in mixture if token != mask), default=0.0)


def _cells(canvas: Canvas, forward: Forward, state: list) -> Text:
    """One row: given cells bold, decided ones from red to green by their probability and underlined where new, soft
    slots in italics under their likeliest token, masks as dots, remasked ones as a sign."""
    out = Text()
    for column, (text, p) in enumerate(state):
        if text is not None:
            style = "bold" if canvas.cells[column] is not None else "dim"
            if p is not None:
                style = f"rgb({int(230 * (1 - p)) + 20},{int(190 * p) + 40},60)"
            out.append(visible(text).strip("␣"), style + (" underline" if column in forward.committed else ""))
        elif column in forward.dropped:
            out.append("↺", "red")
        else:
            named = [token for token, _ in forward.soft.get(column, ()) if token != canvas.mask]
            out.append(visible(named[0]).strip("␣") if named else "·", "italic dim")
        out.append(" ")
    return out
