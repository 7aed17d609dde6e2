"""Where the blocks of a block-causal model lie on a canvas whose prompts are padded on the left.

A model counts its blocks from a row's first token, so the blocks of two prompts of unlike length lie
in other columns. Here they are numbered such that the answers begin in the same block, number
`first`, in every row: one forward then decodes that block of all of them. Places are counted in this
order, block by block; place u of a row is a column of its own, or none, where its prompt has not
begun or its answer is over.

Shapes: B rows, P prompt length, L columns of the canvas, b block length; U places.
"""

import torch
from torch import Tensor

from .schedules import Block


class Grid:
    """Blocks of b columns. at="start": counted from a row's first token, so that an answer may begin
    inside a block; at="end": from the end of its prompt."""

    gaps: Tensor | None = None  # [B, L] bool, columns that nobody sees; None: there are none

    def __init__(
        self, real: Tensor, gen_length: int, b: int, *, at: str = "start", whole: bool = True
    ):
        """real: [B, P] bool, what is not padding; whole: the last block is a whole one, wider than
        gen_length asks for."""
        self.b, P = b, real.shape[1]
        self.begin = (~real).sum(1)  # [B] column of each row's first token
        length = P - self.begin
        # tokens of the prompt in the block where the answer begins
        rest = length % b if at == "start" else torch.zeros_like(length)
        before = (length - rest + b - 1).div(b, rounding_mode="floor")
        answer = (rest + gen_length + b - 1).div(b, rounding_mode="floor")  # [B] blocks
        self.stop = P - rest + answer * b if whole else torch.full_like(rest, P + gen_length)
        self.first, last, stop = (
            int(x) for x in torch.stack([before.max(), answer.max(), self.stop.max()])
        )
        self.number = self.first + last
        self.own = self.number * b  # places that a forward over their own block may decide
        self.length = max(P + gen_length, stop)  # L
        self.origin = P - rest - self.first * b  # [B] column of place 0; may be negative
        ends = self.origin + self.number * b
        # is every place a column of every row?
        self.is_whole = bool(((self.begin == self.origin) & (self.stop == ends)).all())

    def leave_out(self, gaps: Tensor) -> None:
        """From now on the columns `gaps` [B, L] bool are read as padding."""
        self.gaps, self.is_whole = gaps, False

    @property
    def alone(self) -> Tensor:
        """[B, L] bool, positions about which nothing before them says anything; with shifted logits
        their own output stands in."""
        column = torch.arange(self.length, device=self.origin.device)
        return column == self.begin[:, None]

    @property
    def numbers(self) -> Tensor:
        """[B, L] int64, the block of each column, -1 of those that are none of the row's."""
        column = torch.arange(self.length, device=self.origin.device)
        there = (column >= self.begin[:, None]) & (column < self.stop[:, None])
        return ((column - self.origin[:, None]) // self.b).masked_fill(~there, -1)

    def places(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Places [lo, hi) -> their columns [B, hi - lo], and which there are, bool; the columns of
        others lie somewhere on the canvas."""
        column = self.origin[:, None] + torch.arange(lo, hi, device=self.origin.device)
        there = (column >= self.begin[:, None]) & (column < self.stop[:, None])
        column = column.clamp(0, self.length - 1)
        if self.gaps is not None:
            there = there & ~self.gaps.gather(1, column)
        return column, there

    def positions(self, at: Tensor) -> Tensor:
        """[B, W] columns -> how many tokens of the row stand before each."""
        before = self.begin[:, None]
        if self.gaps is not None:
            before = before + self.gaps.cumsum(1).gather(1, at)
        return (at - before).clamp_min(0)

    def place(self, rows: Tensor, cols: Tensor) -> Tensor:
        """[n] places of the positions (rows, cols)."""
        return cols - self.origin[rows]

    def inside(self, lo: int, hi: int) -> Tensor:
        """[B, L] bool, the columns of the places [lo, hi)."""
        column = torch.arange(self.length, device=self.origin.device)
        place = column - self.origin[:, None]
        there = (column >= self.begin[:, None]) & (column < self.stop[:, None])
        return (place >= lo) & (place < hi) & there

    def hull(self, lo: int, hi: int) -> tuple[int, int]:
        """The columns from the first to the last of the places [lo, hi) in any row."""
        ends = torch.stack([self.origin.min() + lo, self.origin.max() + hi])
        start, stop = ends.clamp(0, self.length).tolist()
        return start, stop

    def block(
        self, places: tuple[int, int], masked: Tensor, steps: Tensor, *, carried: bool = False
    ) -> Block:
        """Some places of a block as a block of the canvas. masked: [B, L] bool; steps: [B]."""
        inside = self.carried(places[0]) if carried else self.inside(*places)
        count = (masked & inside).sum(-1)
        return Block(*self.hull(*places), count, steps, inside, places, carried)

    def carried(self, place: int) -> Tensor:
        """[B, L] bool, the columns of a place about which the one before it says something."""
        return self.inside(place, place + 1) & ~self.alone
