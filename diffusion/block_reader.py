"""Forward passes of a block-causal model: a block at a time, over the keys and values of the blocks
before it.

What a finished block leaves depends on the blocks up to it and on nothing behind, so keeping it is
exact, provided that it was computed from the block's final tokens: by a forward of its own, the
store forward, before the next block begins. Forwards inside a block leave nothing.

Shapes: B rows (2 B with guidance), L columns of the canvas, b block length, W places of the forward,
U places up to its end, D width; n positions, flat, row by row.
"""

import torch
from torch import Tensor

from .config import DenoiseConfig
from .grid import Grid
from .net import Facts, Parts
from .reader import Reader, Window
from .schedules import Block

# columns of a block in which a row that waits leaves the batch for so many forwards that it pays
# to move the keys and values of another into its place
LONG = 16
CHUNK = 2048  # places of a store forward, whose attention mask has as many rows


class PrefixCache:
    """Keys and values of places [0, end), in the order of the grid. A forward writes those of its own
    places [lo, hi); whoever means them to stay writes them last. Grows by doubling."""

    def __init__(self, rows: int | None = None):
        """rows: of the batch, where a forward may be of the first of them alone."""
        self.rows = rows
        self.lo = self.hi = self.end = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """keys, values [B, heads, W, head_dim] -> of all up to end, [B, heads, U, head_dim]."""
        if layer not in self.layers or self.layers[layer][0].shape[2] < self.end:
            self.layers[layer] = self._grown(layer, keys), self._grown(layer, values, 1)
        both = [part[: len(keys)] for part in self.layers[layer]]
        for kept, new in zip(both, (keys, values), strict=True):
            kept[:, :, self.lo : self.hi] = new
        return both[0][:, :, : self.end], both[1][:, :, : self.end]

    def _grown(self, layer: int, new: Tensor, which: int = 0) -> Tensor:
        old = self.layers[layer][which] if layer in self.layers else new[:, :, :0]
        room = max(self.end, 2 * old.shape[2])
        grown = new.new_empty(self.rows or len(new), new.shape[1], room, new.shape[3])
        grown[: len(old), :, : old.shape[2]] = old
        return grown

    def get_mask_sizes(self, query_length: int, layer: int) -> tuple[int, int]:
        return self.end, 0

    def get_query_offset(self, layer: int = 0) -> int:
        return self.lo

    def get_seq_length(self, layer: int = 0) -> int:
        return self.lo


class BlockReader(Reader):
    """Reads the places of a grid."""

    def __init__(self, net: Parts, facts: Facts, config: DenoiseConfig, grid: Grid, fixed: Tensor):
        there = grid.inside(0, grid.number * grid.b)
        super().__init__(net, facts, config, there, fixed)
        self.alone = grid.alone  # [B, L]
        self.grid = grid
        self.cache = PrefixCache(len(self.order)) if config.cache != "off" else None
        # what `_layout` made last, and of which places, gaps and seats
        self.layout, self.laid_out = None, (None, None, None)
        self.stored = 0  # places whose keys and values are final
        # [B, D] the output at the last of them, of the rows that were computed: with shifted logits
        # it is about the next place
        self.last: Tensor | None = None

    def block_window(self, block: Block, *, whole: bool, look_back: bool) -> Window:
        """The places of the next forward: of the whole block on the grid, or with an approximate
        cache of a part of it."""
        b, (lo, hi) = self.grid.b, block.places
        first = lo // b * b
        if block.carried:
            span = lo, lo
        elif whole or self.config.cache not in ("prefix", "dual"):
            span = first, first + b
        else:
            lo = max(lo - self.facts.shift, first) if look_back else lo
            span = lo, hi if self.config.cache == "dual" else first + b
        is_own = span == block.places or block.carried
        inside = block.inside if is_own else self.grid.inside(*span)
        return Window(block.start, block.end, inside, span)

    def has_read(self, place: int) -> bool:
        """Does the cache hold keys and values of this place?"""
        return self.cache is not None and place < self.cache.end

    def store(self, canvas: Tensor, hi: int) -> None:
        """Keep keys and values of all places before `hi`, of the tokens that stand there: one forward,
        in however many pieces it is made."""
        if self.cache is None or self.stored >= hi:
            return
        before, step = self.forwards, max(CHUNK // self.grid.b, 1) * self.grid.b
        for lo in range(self.stored, hi, step):
            last = self._forward(canvas, lo, min(lo + step, hi))[:, -1]
        self.last = last
        if self.seated is not None:
            self.last = last.new_zeros(len(self.order), last.shape[-1])
            self.last[self.seated] = last
        self.stored, self.forwards = hi, before + 1
        self.stores.append(before)

    def prefill(self, canvas: Tensor, hi: int) -> None:
        """As `store`, for which a forward is made in any case."""
        self.store(canvas, hi)
        if not hi and self.cache is not None:
            self._forward(canvas, 0, self.grid.b)

    def joined(self, window: Window) -> Window:
        """The same with the places before it that are not stored, which its forward stores."""
        lo, hi = window.span
        first, self.stored = min(self.stored, lo), lo
        return window._replace(span=(first, hi))

    def __call__(
        self,
        canvas: Tensor,
        window: Window,
        rows: Tensor,
        cols: Tensor,
        live: list[int] | None = None,
    ) -> Tensor:
        """As of any reader."""
        lo, hi = window.span
        if live is not None:
            self.sit(live, move=self.grid.b >= LONG)
        if lo == hi and self.cache is not None:
            self.store(canvas, lo)
            self.stores.pop()  # the last of them decides something
        lo = lo if self.cache is not None else 0
        is_last = lo == hi
        hidden = self.last[:, None] if is_last else self._forward(canvas, lo, hi)
        halves = self._halves(canvas)
        seats = [rows + half if is_last else self._seat(rows + half) for half in halves]
        source = self.grid.place(rows, cols) - self.facts.shift * ~self.alone[rows, cols] - lo
        chosen = [hidden[seat, source.clamp_min(0)] for seat in seats]
        if self.last is not None and lo % self.grid.b == 0:  # the first place's was said before it
            before = (source < 0)[:, None]
            chosen = [
                torch.where(before, self.last[rows + half], own)
                for half, own in zip(halves, chosen, strict=True)
            ]
        return self.guided(self.net.head(torch.cat(chosen)).float())

    def _forward(self, canvas: Tensor, lo: int, hi: int) -> Tensor:
        """-> hidden [B, hi - lo, D] of places [lo, hi), which see all places of their block and of
        those before."""
        at, positions, mask = self._layout(lo, hi)
        end = -(-hi // self.grid.b) * self.grid.b  # of the block
        embeds = self._embedded(canvas, at, lo)
        if self.twice:
            embeds = torch.cat([embeds, self._embedded(self.without_prompt(canvas), at, lo)])
        embeds = self.of_seats(embeds)
        if self.cache is not None:
            self.cache.lo, self.cache.hi, self.cache.end = lo, hi, end
        self.forwards += 1
        self.positions += embeds.shape[0] * embeds.shape[1]
        return self.net.body(embeds, mask, positions, self.cache)

    def _layout(self, lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Columns [B, W] of the places [lo, hi); their positions, and which places they see, of the
        rows that have a seat. The steps of a block have the same."""
        span, gaps, seated = self.laid_out
        if span != (lo, hi) or gaps is not self.grid.gaps or seated is not self.seated:
            at, _ = self.grid.places(lo, hi)
            positions = self.grid.positions(at)
            mask = self._mask(lo, hi, -(-hi // self.grid.b) * self.grid.b)
            is_of_rows = mask is not None and len(mask) > 1
            if self.twice:
                positions = positions.repeat(2, 1)
                mask = mask.repeat(2, 1, 1, 1) if is_of_rows else mask
            mask = self.of_seats(mask) if is_of_rows else mask
            self.layout = at, self.of_seats(positions), mask
            self.laid_out = (lo, hi), self.grid.gaps, self.seated
        return self.layout

    def _mask(self, lo: int, hi: int, end: int) -> Tensor | None:
        """[1 or B, 1, hi - lo, end] bool, which places see which; None: all see all."""
        b, whole = self.grid.b, self.grid.is_whole
        if whole and hi - lo // b * b <= b:
            return None
        place = torch.arange(end, device=self.grid.begin.device)
        sees = (place // b <= place[lo:hi, None] // b)[None, None]
        if whole:
            return sees
        _, keys = self.grid.places(0, end)
        # A place that is none sees itself: a row of the softmax without a key would be NaN.
        return (sees & keys[:, None, None, :]) | (place == place[lo:hi, None])

    def _embedded(self, canvas: Tensor, at: Tensor, lo: int) -> Tensor:
        """[B, W, D] what stands in the columns `at` [B, W], those of the places from `lo` on."""
        embeds = self.net.embedding(canvas.gather(1, at))
        if self.where is not None:
            first, end = max(lo, self.soft[0]), min(lo + at.shape[1], self.soft[1])
            span = slice(first - lo, end - lo)
            shows = self.where.gather(1, at[:, span])[..., None]
            mixed = self.mixed[:, first - self.soft[0] : end - self.soft[0]]
            embeds[:, span] = torch.where(shows, mixed, embeds[:, span])
        return embeds

    def _soft_room(self, window: Window) -> int:
        """The mixtures of the block alone, whatever the length of the canvas."""
        b = self.grid.b
        lo = max(window.span[0], window.span[1] - 1) // b * b
        self.soft = lo, lo + b  # the places that may be soft
        return b

    def _soft_place(self, rows: Tensor, cols: Tensor) -> Tensor:
        return self.grid.place(rows, cols) - self.soft[0]
