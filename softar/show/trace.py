"""What a decode believed, step by step, as plain data: for the page, for the terminal, as JSON.

Two families. A `Trace` is a chain of steps, each with the mixture that was fed back. A `Canvas` is
a row of cells that forwards fill. Both hold text and numbers only: no tensors, and nothing that
needs the model or the tokenizer again.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..decode import SoftOutput

TOP = 10  # candidates of a mixture that are kept
# slots of a mixture that are looked at one by one; wider ones are whole distributions, without
# repeats
MANY = 256
Mixture = list[tuple[str, float]]  # tokens and weights, heaviest first


@dataclass(frozen=True)
class Step:
    """One step of an autoregressive decode."""

    # "soft": the mixture was fed back; "hard": one token, the model's choice; "forced": one, put by
    # a rule; "latent": a vector that no token stands for
    kind: str
    token: str  # stands for the step in the text; "" of a latent step
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

    # What it decided, and the probability that had; None: filled in by a rule (behind an end of
    # text)
    committed: dict[int, tuple[str, float | None]] = field(default_factory=dict)
    # What slots show in the next forward; the mask is listed under the canvas's `mask`. Weights
    # need not sum to 1
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
        """The canvas before the first forward and after each: per cell its text, None for a mask,
        and the probability that it had when it was decided, None where none decided it."""
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
        self.tokenizer, self.texts = tokenizer, {}

    def __getitem__(self, token: int) -> str:
        if token not in self.texts:
            self.texts[token] = self.tokenizer.decode([token])
        return self.texts[token]

    def mixtures(
        self, ids: "Tensor", weights: "Tensor", top: int
    ) -> Iterator[tuple[Mixture, float, int]]:
        """[n, K] -> of each row the `top` heaviest tokens, the weight of the others, and how many
        those are. A token that was drawn more than once counts once, with all its weight; weights
        of 0 are padding."""
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
    """The trace of one row of what `softar.generate` returns, with the `top` likeliest tokens of
    each mixture."""
    from ..thought import Kind  # here, so that a trace can be read and shown without torch

    words, record = Words(tokenizer), out.record
    columns = (column[row].tolist() for column in (record.kind, record.token, record.entropy))
    weights = record.weights[row]  # a normalised mixture has more than 1 in all
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(1)
    mixtures = words.mixtures(record.ids[row], shares, top)
    steps = []
    for kind, token, nats, mixture in zip(*columns, mixtures, strict=True):
        if kind != Kind.PAD:  # at the end only
            nats = nats if math.isfinite(nats) else None
            text = "" if kind == Kind.LATENT else words[token]
            steps.append(Step(Kind(kind).name.lower(), text, nats, *mixture))
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
            return Canvas(
                **data | {"forwards": [_forward(**forward) for forward in data["forwards"]]}
            )
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"this is no trace: {error!r}; read what softar.show.trace.to_json wrote"
        ) from None
    raise ValueError(f"family={family!r} is unknown: a trace is 'autoregressive' or 'diffusion'")


def _forward(committed: dict, soft: dict, dropped: list) -> Forward:
    return Forward(
        {int(column): tuple(decided) for column, decided in committed.items()},
        {int(column): _pairs(mixture) for column, mixture in soft.items()},
        dropped,
    )


def _pairs(mixture: list) -> Mixture:
    return [tuple(pair) for pair in mixture]
