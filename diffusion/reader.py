"""Forward passes over a window of the canvas: the cache, and the mixtures that stand in place of
masks."""

from typing import NamedTuple

import torch
from torch import Tensor

from softar.soft import Soft, soft_embed

from .config import DenoiseConfig
from .net import Facts, Parts
from .schedules import Block


class Window(NamedTuple):
    """The columns of a forward: [lo, hi), or in each row a part of that."""

    lo: int
    hi: int
    inside: Tensor  # [1 or B, L] bool
    span: tuple[int, int] | None = None  # its places on the grid of a block-causal model


def with_answer(real: Tensor, config: DenoiseConfig) -> Tensor:
    """[B, P] bool, what is not padding -> [B, P + gen_length]: masks are none."""
    return torch.nn.functional.pad(real, (0, config.gen_length), value=True)


class WindowCache:
    """Keys and values of a whole canvas, of which a forward renews a window: the prefix and the
    dual cache of Fast-dLLM (arXiv:2505.22618, section 3.2) are the windows [block start, L) and
    [block start, block end).

    A forward over the whole canvas fills it. Keys are kept as the layers give them, after the
    rotation: positions never change, so renewing them is not needed.
    """

    def __init__(self):
        self.window: tuple[int, int] | None = None  # None: the next forward covers the whole canvas
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """keys, values [B, heads, T, head_dim] of the window -> those of the canvas, [B, heads, L,
        head_dim]."""
        if self.window is None:
            self.layers[layer] = keys, values
            return keys, values
        lo, hi = self.window
        all_keys, all_values = (part[: len(keys)] for part in self.layers[layer])
        all_keys[:, :, lo:hi] = keys
        all_values[:, :, lo:hi] = values
        return all_keys, all_values

    def get_mask_sizes(self, query_length: int, layer: int) -> tuple[int, int]:
        return (query_length if self.window is None else self.layers[0][0].shape[2]), 0

    def get_query_offset(self, layer: int = 0) -> int:
        return 0 if self.window is None else self.window[0]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.get_query_offset()


def swap(cache, a: int, b: int) -> None:
    """Let two rows of all keys and values change places."""
    for part in (part for both in cache.layers.values() for part in both):
        part[[a, b]] = part[[b, a]]


def same_rows(*parts: Tensor | None) -> tuple[Tensor, Tensor]:
    """[u] the first of all rows that are the same in the parts [n, ...], to the bit, and [n] which of
    these each row is."""
    there = [part.flatten(1).contiguous() for part in parts if part is not None]
    rows = zip(*(part.view(torch.uint8).cpu().numpy() for part in there))
    first: dict[bytes, int] = {}
    which = [
        first.setdefault(b"".join(part.tobytes() for part in row), i) for i, row in enumerate(rows)
    ]
    device = there[0].device
    return tuple(torch.tensor(which, device=device).unique(return_inverse=True))


class Reader:
    """Runs the model on a window of the canvas, for the rows that have a seat. Keeps what forwards
    leave: keys and values, soft slots, counts."""

    def __init__(
        self, net: Parts, facts: Facts, config: DenoiseConfig, real: Tensor, fixed: Tensor
    ):
        self.net, self.facts, self.config, self.fixed = net, facts, config, fixed
        self.twice = config.cfg_scale > 0
        self.length = real.shape[1]
        self.positions_of = (real.cumsum(1) - 1).clamp_min(0)  # padding does not count
        self.first = (~real).sum(1)  # [B] column of each row's first token
        self.mask = None if bool(real.all()) else real.long()
        if self.twice:
            self.positions_of = self.positions_of.repeat(2, 1)
            self.mask = None if self.mask is None else self.mask.repeat(2, 1)
        self.cache = WindowCache() if config.cache in ("prefix", "dual") else None
        # are rows that read the same computed once? As the answers to a prompt do, until draws part
        self.shares = False
        # the rows (with guidance twice as many) as they lie in the cache, and how many of them have
        # a seat; [n] which those are, and [rows] the seat of each: None where all have their own
        self.order = [*range(len(self.positions_of))]
        self.seats = len(self.order)
        self.seated: Tensor | None = None
        self.seat: Tensor | None = None
        self.last_window: Window | None = None  # a block's steps have the same
        self.forwards = self.positions = 0
        self.stores: list[int] = []  # the forwards that store and decide nothing, from 0
        self.where: Tensor | None = None  # [B, L] bool, slots that show a mixture
        self.mixed: Tensor | None = None  # [B, L, D] their inputs

    def window(self, block: Block, *, whole: bool, look_back: bool) -> Window:
        """Columns of the next forward."""
        lo, hi = 0, self.length
        if self.cache is not None and not whole:
            # With shifted logits a position is predicted from the one before it.
            lo = max(block.start - self.facts.shift, 0) if look_back else block.start
            hi = block.end if self.config.cache == "dual" else self.length
        return self.columns(lo, hi)

    def columns(self, lo: int, hi: int) -> Window:
        if self.last_window is None or self.last_window[:2] != (lo, hi):
            index = torch.arange(self.length, device=self.fixed.device)
            self.last_window = Window(lo, hi, ((index >= lo) & (index < hi))[None])
        return self.last_window

    def sit(self, rows: list[int], *, move: bool = True) -> None:
        """From now on forwards compute these rows; no others, or, where keys and values are not to
        be moved, those that lie before the last of them."""
        rows = [row + half for half in self._halves(self.fixed) for row in rows]
        order, sits = [*self.order], set(rows)
        if self.cache is None or not self.cache.layers:
            order = rows + [row for row in order if row not in sits]
        elif move:
            free = [i for i, row in enumerate(order[: len(rows)]) if row not in sits]
            come = [i for i, row in enumerate(order) if i >= len(rows) and row in sits]
            for a, b in zip(free, come, strict=True):
                order[a], order[b] = order[b], order[a]
                swap(self.cache, a, b)
        n = 1 + max(i for i, row in enumerate(order) if row in sits)
        if order[:n] == self.order[: self.seats]:
            return
        self.order, self.seats, self.seated, self.seat = order, n, None, None
        if order[:n] != [*range(len(order))]:
            index = torch.tensor(order, device=self.fixed.device)
            self.seated, self.seat = index[:n], index.argsort()

    def of_seats(self, part: Tensor | None) -> Tensor | None:
        """[rows, ...] -> [n, ...] of those that have a seat."""
        return part if part is None or self.seated is None else part[self.seated]

    def _seat(self, rows: Tensor) -> Tensor:
        return rows if self.seat is None else self.seat[rows]

    def _halves(self, canvas: Tensor) -> list[int]:
        """Where the rows of each reading begin in a batch: with the prompt, and without it."""
        return [0, len(canvas)] if self.twice else [0]

    def __call__(
        self,
        canvas: Tensor,
        window: Window,
        rows: Tensor,
        cols: Tensor,
        live: list[int] | None = None,
    ) -> Tensor:
        """-> logits [n, V] float32 about the positions (rows, cols), which lie in the window. live:
        the rows that are computed, all that are asked about among them; None: as before."""
        lo, hi = window.lo, window.hi
        if self.cache is not None:
            self.cache.window = None if (lo, hi) == (0, self.length) else (lo, hi)
            if self.cache.window is None:
                self.cache.layers = {}
        if live is not None:
            self.sit(live)
        embeds = self._inputs(canvas, lo, hi)
        if self.twice:
            embeds = torch.cat([embeds, self._inputs(self.without_prompt(canvas), lo, hi)])
        embeds, positions = self.of_seats(embeds), self.of_seats(self.positions_of[:, lo:hi])
        hidden = self._hidden(embeds, self.of_seats(self.mask), positions)
        self.forwards, self.positions = (
            self.forwards + 1,
            self.positions + embeds.shape[0] * embeds.shape[1],
        )
        # With shifted logits nothing is about the first token, whose own output stands in.
        source = torch.maximum(cols - self.facts.shift, self.first[rows]).clamp_min(lo) - lo
        chosen = [hidden[self._seat(rows + half), source] for half in self._halves(canvas)]
        chosen = torch.cat(chosen) if self.twice else chosen[0]
        return self.guided(self.net.head(chosen).float())

    def _hidden(self, embeds: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """[n, T, D]"""
        if not self.shares:
            return self.net.body(embeds, mask, positions, self.cache)
        first, which = same_rows(embeds, mask)
        mask = mask if mask is None else mask[first]
        return self.net.body(embeds[first], mask, positions[first], None)[which]

    def without_prompt(self, canvas: Tensor) -> Tensor:
        """[B, L] what the guided-away reading sees: masks where the caller gave tokens, but for those
        to keep."""
        hidden = self.fixed
        if self.config.cfg_keep_ids:
            keep = canvas.new_tensor(self.config.cfg_keep_ids)
            hidden = hidden & ~torch.isin(canvas, keep)
        return canvas.masked_fill(hidden, self.facts.mask_id)

    def guided(self, logits: Tensor) -> Tensor:
        """Logits [n, V]; with guidance [2 n, V], without the prompt in the second half -> [n, V]."""
        if not self.twice:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + (self.config.cfg_scale + 1) * (conditional - unconditional)

    def _inputs(self, canvas: Tensor, lo: int, hi: int) -> Tensor:
        embeds = self.net.embedding(canvas[:, lo:hi])
        if self.where is None:
            return embeds
        return torch.where(self.where[:, lo:hi, None], self.mixed[:, lo:hi], embeds)

    def soften(
        self, soft: Soft, shows: Tensor, rows: Tensor, cols: Tensor, window: Window, busy: Tensor
    ) -> tuple[Tensor, Soft]:
        """From now on the positions (rows, cols) that `shows` names show these mixtures, and others
        of the window don't, in the rows that are busy. -> where mixtures were put [B, L], and
        which."""
        soft = Soft(soft.ids[shows], soft.weights[shows])
        mixed = soft_embed(soft, self.net.embedding, rescale=self.config.rescale)
        if self.where is None:
            self.where = torch.zeros_like(self.fixed)
            self.mixed = mixed.new_zeros(len(self.fixed), self._soft_room(window), mixed.shape[-1])
        rows, cols = rows[shows], cols[shows]
        put = torch.zeros_like(self.where)
        put[rows, cols] = True
        renewed = window.inside & busy[:, None]
        self.where = (self.where & ~renewed) | put
        self.mixed[rows, self._soft_place(rows, cols)] = mixed
        return put, soft

    def _soft_room(self, window: Window) -> int:
        """How many mixtures a row may have; asked when the first of a window are put."""
        return self.length

    def _soft_place(self, rows: Tensor, cols: Tensor) -> Tensor:
        """[n] where `mixed` has those of the positions (rows, cols)."""
        return cols

    def forget(self, slots: Tensor | None = None) -> None:
        """Show no mixtures any more, at the `slots` [B, L] bool; None: nowhere."""
        if slots is None:
            self.where = None
        elif self.where is not None:
            self.where = self.where & ~slots
