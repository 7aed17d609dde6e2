"""The process of a block-causal model (SDAR, Fast-dLLM v2, LLaDA2, BD3LM), which reads in both
directions inside a block of its own fixed length and causally from block to block.

Shapes: B rows, P prompt length, L columns of the canvas.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .block_reader import BlockReader
from .canvas import Canvas
from .config import DenoiseConfig
from .grid import Grid
from .masked import Masked
from .net import Facts, Parts
from .reader import Reader, Window
from .schedules import Block, Quota
from .select import Draws


class BlockCausal(Masked):
    """The blocks of the model's own grid from left to right, those of the prompt included. Before a
    block is begun, keys and values of all before it are stored; its steps are those of any model of
    masks, over the block alone."""

    reader: BlockReader

    def __init__(
        self,
        config: DenoiseConfig,
        net: Parts,
        facts: Facts,
        input_ids: Tensor,
        real: Tensor,
        draws: Draws,
        *,
        record: bool = False,
    ):
        """input_ids: [B, P]; real: [B, P] bool, what is not padding."""
        check_blocks(config, facts)
        quirks = config.quirks
        length = config.block_length or facts.block_length
        if quirks.mk_grid is not None:
            self.grid = quirks.mk_grid(real, config.gen_length, length)
        else:
            at = quirks.grid_from if quirks.blocks else config.grid
            self.grid = Grid(real, config.gen_length, length, at=at, whole=not quirks.short_last)
        self.eos_id = facts.eos_id
        self.first_from_store = quirks.first_from_store and facts.shift == 1
        super().__init__(config, net, facts, input_ids, real, draws, record=record)
        self.number: int | None = None  # of the block of the grid that is being decoded
        # [B] places before which nothing of the row is left to be stored
        self.kept = (self.grid.begin - self.grid.origin) // self.grid.b * self.grid.b
        # [B] rows in which a step has put an end token
        self.filled = torch.zeros_like(self.canvas.masked[:, 0])

    def _canvas(self, input_ids: Tensor, facts: Facts) -> Canvas:
        filler = 0 if facts.eos_id is None else facts.eos_id
        if self.quirks.loses is not None:
            lost = self.quirks.loses(self.grid, input_ids.shape[1])
            input_ids = input_ids.masked_fill(lost, facts.mask_id)
        more = dict(length=self.grid.length, stop=self.grid.stop, filler=filler)
        canvas = Canvas(input_ids, self.config.gen_length, facts.mask_id, **more)
        if self.quirks.blocks:  # whose results are whole blocks
            canvas.width = self.grid.length
        return canvas

    def _reader(self, net: Parts, facts: Facts, real: Tensor) -> Reader:
        return BlockReader(net, facts, self.config, self.grid, self.canvas.fixed)

    def _block_numbers(self, real: Tensor) -> Tensor:
        return self.grid.numbers

    def blocks(self) -> Iterable[Block]:
        """Those that hold a mask when their turn comes. A row shares its steps among the blocks that
        it has masks in."""
        masked, counts = self.canvas.masked & self.canvas.columns(0, self.canvas.width), []
        for places, carried in self.pieces():
            piece = self.grid.block(places, masked, self.canvas.at_start, carried=carried)
            masked = masked & ~piece.inside
            if not carried:
                counts.append(piece.count)
        return self._blocks(share_of_steps(self.config, torch.stack(counts, -1)))

    def _blocks(self, steps: Tensor | None) -> Iterable[Block]:
        share = self.canvas.at_start.clamp(1, 1) if steps is None else steps
        for places, carried in self.pieces():
            block = self.grid.block(places, self.canvas.masked, share, carried=carried)
            if steps is None:  # one for each mask
                block = block._replace(steps=block.count.clamp_min(1))
            if self.canvas.has_masks(self._seen(block), self.reader.forwards):
                yield block
            elif carried and self.reader.forwards and self.quirks.stores_each:
                self.reader.store(self.canvas.ids, places[0])
            if self.over(block):
                return

    def pieces(self) -> Iterator[tuple[tuple[int, int], bool]]:
        """The places that are decoded together, from left to right: sub-blocks; and before those of
        a block its first place, if the forward that stores the places before it says what comes
        there."""
        b = self.grid.b
        length = self.config.sub_block_length or b
        for lo in range(0, self.grid.number * b, length):
            if lo and lo % b == 0 and self.first_from_store:
                yield (lo, lo + 1), True
            if lo < self.grid.own:
                yield (lo, lo + length), False

    def begin(self, block: Block) -> None:
        super().begin(block)
        if self.narrows:  # of rows that are whole nothing is stored any more
            self.reader.sit(self.canvas.alive)
        self.halted = False
        # Who takes tokens back may take those that are shown for those that are not.
        revises = self.schedule.revises or self.softener.revises or self.config.remask
        self.wanted = block if revises else self._seen(block)
        lo, b = block.places[0], self.grid.b
        if lo // b != self.number:  # its first place may be the caller's, and not asked about
            self.number = lo // b
            self.reader.forget()  # later blocks read tokens
        due = self.begins & (self.kept < (here := lo // b * b))
        self.kept = self.kept.masked_fill(due, here)
        if block.carried:  # nothing more will be known of it
            self.rule, self.outlasts = Quota(lambda index, left: left), False
            return
        if self.quirks.ends_are_gaps:
            self.grid.leave_out(self.canvas.ids == self.eos_id)
        if not self.quirks.joins:
            self.reader.store(self.canvas.ids, here)
            due = due & (self.reader.cache is not None)
            self.row_forwards, self.own_stores = self.row_forwards + due, self.own_stores + due
        elif not self.reader.forwards:
            self.reader.prefill(self.canvas.ids, here)

    def _live(self, block: Block) -> list[int] | None:
        return None if block.carried else super()._live(block)

    def _window(self, block: Block, index: int) -> Window:
        whole = index == 0
        if self.quirks.whole_for_first and not block.carried:
            lo = block.places[0]
            first = self.canvas.masked & self.grid.inside(lo, lo + 1)
            whole = not self.reader.has_read(lo) or bool(first.any())
        window = self.reader.block_window(block, whole=whole, look_back=self.quirks.looks_back)
        return self.reader.joined(window) if self.quirks.joins else window

    def more(self, block: Block, index: int) -> bool:
        if block.carried and index:  # what a public sampler leaves a mask its own block decides
            self.reader.alone = self.reader.alone | (self.canvas.masked & block.inside)
            return False
        return super().more(block, index) and not self.halted

    def step(self, block: Block, index: int) -> dict:
        told = super().step(block, index)
        how = self.quirks.stops_inside
        if self.end_ids and (how == "answer" or (how and self.config.early_stop)):
            self.halted = self._halts(block, told["committed"])
        if self.quirks.stop == "filled" and not block.carried:
            is_end = torch.isin(told["sequences"], told["sequences"].new_tensor(self.end_ids))
            self.filled = self.filled | (is_end & told["committed"]).any(-1)
        return told

    def _halts(self, block: Block, committed: Tensor) -> bool:
        """Does the block end with this step, though masks are left?"""
        canvas = self.canvas
        is_end = torch.isin(canvas.ids, canvas.ids.new_tensor(self.end_ids))
        if self.quirks.stops_inside == "block":
            return bool((is_end & block.inside).any())
        if self.quirks.stops_inside == "answer":
            is_end, committed = is_end & ~canvas.fixed, is_end
        before = is_end.cumsum(-1) == 0
        whole = ~(canvas.masked & before).any(-1) & is_end.any(-1)
        return bool(((committed & is_end).any(-1) & whole).any())

    def end(self, block: Block) -> None:
        if self.quirks.stores_last and block.places[1] % self.grid.b == 0:
            self.reader.forget()
            self.reader.store(self.canvas.ids, block.places[1])
        stops = self.config.early_stop
        if stops is None:  # a template goes on behind its masks, and `allowed` says what slots take
            stops = self.config.gen_length > 0 and not self.config.allowed
        if stops and self.end_ids and self.quirks.stop == "rows":
            self.canvas.stop(block.end, self.end_ids)

    def over(self, block: Block) -> bool:
        """Does the whole batch end after this, with masks left behind? The public samplers have it
        so."""
        if self.quirks.is_patient and not block.carried:
            if self.canvas.has_masks(block, self.reader.forwards):
                return True
        if not self.end_ids:
            return False
        if self.quirks.stop == "filled":
            if block.carried or block.places[1] % self.grid.b:
                return False
            self.canvas.end(self.filled, self.end_ids)
            return bool(self.filled.all())
        if self.quirks.stop not in ("any", "all"):
            return False
        if self.config.early_stop is False:
            return False
        ended = self.canvas.ended(self.end_ids)
        return bool(ended.any() if self.quirks.stop == "any" else ended.all())


def check_blocks(config: DenoiseConfig, facts: Facts) -> None:
    """Raise ValueError for options that say nothing to a block-causal model."""
    if config.quirks.blocks:
        return
    if config.block_length not in (None, facts.block_length):
        raise ValueError(
            f"block_length={config.block_length} contradicts the model, whose blocks are of {facts.block_length}: "
            f"leave it out"
        )
    b, sub = facts.block_length, config.sub_block_length
    if sub is not None and b % sub:
        raise ValueError(
            f"sub_block_length={sub} does not divide the model's blocks of {b}: choose a divisor"
        )
    if config.cache in ("prefix", "dual") and sub in (None, b):
        raise ValueError(
            f"cache={config.cache!r} says nothing beyond the exact cache of a block-causal model where the whole "
            f"block is decoded at once: give a sub_block_length below {b}"
        )


def share_of_steps(config: DenoiseConfig, counts: Tensor) -> Tensor | None:
    """[B, blocks] masks -> [B] steps of each block that has some; None where each mask has one."""
    if config.steps is None:
        return None
    blocks = (counts > 0).sum(-1).clamp_min(1)
    if short := (config.steps < blocks).nonzero()[:, 0].tolist():
        most = int(blocks.max())
        raise ValueError(
            f"steps={config.steps} cannot be shared by the {most} blocks of rows {short}: give at least {most}"
        )
    return config.steps // blocks
