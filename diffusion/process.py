"""What `denoise` asks of a way to decode, one for each kind of model: `masked.Masked` fills masks,
`uniform.Uniform` redraws every token, `renoised.Renoised` keeps the surest for the next forward.

A process lives for one call. It holds the canvas, the reader that runs the model over it, and what
decides in it; its constructor refuses what the kind of model cannot do.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor

from softar.soft import Soft

from .canvas import Canvas
from .config import DenoiseConfig
from .reader import Reader
from .schedules import Block
from .select import Belief


class Process(Protocol):
    canvas: Canvas
    reader: Reader
    # [B] int64, forwards until the row was decoded, and those of them that store
    row_forwards: Tensor
    row_stores: Tensor

    def blocks(self) -> Iterable[Block]:
        """What is decoded together, one after the other; each is made when its turn comes, so that
        it may depend on what was decoded. Raises ValueError for what does not fit the canvas,
        before the first."""

    def begin(self, block: Block) -> None:
        """Whatever a block needs before its first step: a rule, a prefill."""

    def more(self, block: Block, index: int) -> bool:
        """Is a step `index`, from 0, wanted?"""

    def step(self, block: Block, index: int) -> dict:
        """One forward, and what follows from it -> what the callback is told (`report`)."""

    def end(self, block: Block) -> None:
        """Whatever a decoded block needs: rows that stop, keys and values that are stored."""


def check_options(config: DenoiseConfig, options: dict[str, tuple | None], why: str) -> None:
    """Raise ValueError for an option away from its default that is not among `options`, or has none
    of the values there; None allows every value. why: goes on after "does not go with"."""
    idle = DenoiseConfig()
    for name in (field.name for field in fields(config)):
        value, default = getattr(config, name), getattr(idle, name)
        is_fine = name in options and (options[name] is None or value in options[name])
        if value != default and not is_fine:
            raise ValueError(f"{name}={value!r} does not go with {why}: leave it at {default!r}")


def report(
    process: Process,
    block: Block,
    asked: Tensor,
    committed: Tensor,
    certain: Tensor,
    *,
    believed: tuple[Tensor, Callable[[Tensor], Tensor]],
    where: Tensor | None = None,
    soft=None,
) -> dict:
    """A step as the callback is told of it. asked, committed: [B, L] bool; certain: [B, L].
    believed: positions [B, L] bool, n of them; and which of them, [n] bool -> their logits [m, V]."""
    width = process.canvas.width

    def entropy() -> Tensor:
        positions, logits_of = believed
        rows, cols = positions.nonzero(as_tuple=True)
        here = committed[rows, cols]
        nats = -Belief(logits_of(here)).negative_entropy
        every = torch.full(asked.shape, torch.nan, device=asked.device)
        return every.index_put((rows[here], cols[here]), nats)[:, :width]

    if soft is not None and width < asked.shape[1]:
        soft = Soft(*(part[where.nonzero()[:, 1] < width] for part in soft))
    return {
        "step": process.reader.forwards - 1,
        "block": (block.start, min(block.end, width)),
        "sequences": process.canvas.ids[:, :width],
        "committed": committed[:, :width],
        "confidence": certain.masked_fill(~asked, torch.nan)[:, :width],
        "entropy": entropy,
        "where": None if where is None else where[:, :width],
        "soft": soft,
    }
