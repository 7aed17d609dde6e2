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
        all_keys, all_values = self.layers[layer]
        all_keys[:, :, lo:hi] = keys
        all_values[:, :, lo:hi] = values
        return all_keys, all_values

    def get_mask_sizes(self, query_length: int, layer: int) -> tuple[int, int]:
        return (query_length if self.window is None else self.layers[0][0].shape[2]), 0

    def get_query_offset(self, layer: int = 0) -> int:
        return 0 if self.window is None else self.window[0]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.get_query_offset()


class Reader:
    """Runs the model on a window of the canvas. Keeps what forwards leave: keys and values, soft
    slots, counts."""

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
        index = torch.arange(self.length, device=self.fixed.device)
        return Window(lo, hi, ((index >= lo) & (index < hi))[None])

    def __call__(self, canvas: Tensor, window: Window, rows: Tensor, cols: Tensor) -> Tensor:
        """-> logits [n, V] float32 about the positions (rows, cols), which lie in the window."""
        lo, hi = window.lo, window.hi
        embeds = self._inputs(canvas, lo, hi)
        if self.twice:
            embeds = torch.cat([embeds, self._inputs(self.without_prompt(canvas), lo, hi)])
        if self.cache is not None:
            self.cache.window = None if (lo, hi) == (0, self.length) else (lo, hi)
        hidden = self.net.body(embeds, self.mask, self.positions_of[:, lo:hi], self.cache)
        self.forwards, self.positions = (
            self.forwards + 1,
            self.positions + embeds.shape[0] * embeds.shape[1],
        )
        # With shifted logits nothing is about the first token, whose own output stands in.
        source = torch.maximum(cols - self.facts.shift, self.first[rows]).clamp_min(lo) - lo
        chosen = hidden[rows, source]
        if self.twice:
            chosen = torch.cat([chosen, hidden[rows + len(canvas), source]])
        return self.guided(self.net.head(chosen).float())

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
