"""What a schedule's rule is told of a step, and what it says.

Shapes: B rows, L columns of the canvas.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Block(NamedTuple):
    """A stretch of the canvas that is decoded before what is right of it."""

    start: int
    end: int
    count: Tensor  # [B] int64 masks in it when it begins
    steps: Tensor  # [B] int64 forwards that a schedule which shares tokens out has for it
    # [1 or B, L] bool, its columns: [start, end), or in each row a part of that
    inside: Tensor | None = None
    # of a block-causal model: its places on the grid
    places: tuple[int, int] = (0, 0)
    # one place, about which the forward that stores the places before it says all
    carried: bool = False


class Step(NamedTuple):
    """What a rule decides with."""

    index: int  # from 0 in each block
    score: Tensor  # [B, L] float32 of the selector, -inf where nothing was asked
    open: Tensor  # [B, L] bool, may commit now
    decoded: Tensor  # [B, L] bool, committed earlier in this block
    confidence: Tensor  # [B, L] float32 probability of each decoded token when it was committed
    # What the model thinks by now of the open and the decoded positions, -inf and False elsewhere;
    # only for a schedule that revises, else None.
    prob: Tensor | None = None  # [B, L] float32 probability of each proposal
    standing: Tensor | None = None  # [B, L] float32 probability of the token that stands there
    differs: Tensor | None = None  # [B, L] bool, the proposal is another token than that
    # () -> [B, L] float32, nats, how far the model's belief about the open positions has moved since
    # the step before (the divergence of the new one from the old); inf where there was none. Only
    # for a schedule that refines.
    change: Callable[[], Tensor] | None = None


@runtime_checkable
class Rule(Protocol):
    def more(self, index: int, left: bool) -> bool:
        """Is another forward wanted, where `left` says whether the block has masks?"""

    def __call__(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """-> [B, L] bool: commit these, open or decoded; and mask these again (None: nothing)."""


@runtime_checkable
class Outlasting(Rule, Protocol):
    """A rule that goes on when no mask is left."""

    busy: Tensor  # [B] bool, rows in which another forward is wanted; others wait
