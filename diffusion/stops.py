"""When a row of a block is decoded, though steps are left: for models that redraw their slots in
each forward, where nothing that was committed says so.

A stop is `fn(**knobs) -> Stop`, called when a block begins; what it gives is asked after each step.

Shapes: B rows, C slots of the block.
"""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from softar.names import lookup

from .knobs import check_knobs

GROUP = "softar.stops"  # of entry points


class Stop(Protocol):
    def __call__(self, tokens: Tensor, entropy: Tensor) -> Tensor:
        """[B, C] the most likely tokens now and the entropies, nats, of the distributions that they
        are of; of rows that are decoded both stay -> [B] bool: decoded."""


class Stable:
    """The last tokens are those of `stability` steps before, and the mean entropy is small."""

    def __init__(self, stability: int, confidence: float):
        self.stability, self.confidence = stability, confidence
        self.before: list[Tensor] = []  # tokens of the last steps, the latest first

    def __call__(self, tokens: Tensor, entropy: Tensor) -> Tensor:
        decoded = entropy.mean(-1) < self.confidence
        if len(self.before) < self.stability:
            decoded = torch.zeros_like(decoded)
        for earlier in self.before:
            decoded = decoded & (earlier == tokens).all(-1)
        self.before = [tokens, *self.before][: self.stability]
        return decoded


def stable(*, stability: int = 1, confidence: float = 0.005) -> Stop:
    """Stable and confident: the most likely tokens are what they were in so many steps before, and
    the mean entropy lies below `confidence` nats (DiffusionGemma in transformers)."""
    return Stable(stability, confidence)


def never() -> Stop:
    """All steps are taken."""
    return lambda tokens, entropy: torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


def mk_stop(stop: str | Callable, **knobs) -> Callable[[], Stop]:
    """What makes the stop of a block: of that name (of STOPS, of an entry point in the group
    softar.stops, or "module:function"), or a function; with its knobs bound."""
    method = lookup("stop", stop, STOPS, GROUP) if isinstance(stop, str) else stop
    if not callable(method):
        raise ValueError(f"stop={stop!r} is a {type(method).__name__}, and no function")
    if isinstance(stop, str) and stop in STOPS:  # what a user's takes is its own affair
        check_knobs("stop", stop, knobs, method.__kwdefaults__ or {}, STOP_KNOBS)
    return functools.partial(method, **knobs)


STOP_KNOBS = {
    "stability": (
        lambda n: isinstance(n, int) and not isinstance(n, bool) and n >= 0,
        "must be a whole number, at least 0: steps before that gave the same tokens",
    ),
    "confidence": (
        lambda x: isinstance(x, (int, float)) and math.isfinite(x) and x > 0,
        "must be > 0, nats",
    ),
}
STOPS: dict[str, Callable[..., Stop]] = {"stable": stable, "never": never}
