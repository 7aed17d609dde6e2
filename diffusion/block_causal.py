"""The process of a block-causal model (SDAR, Fast-dLLM v2, LLaDA2, BD3LM), which reads in both
directions inside a block of its own fixed length and causally from block to block.

Shapes: B rows, P prompt length, L columns of the canvas.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .block_reader import BlockReader
from .canvas import Canvas
from .config import DenoiseConfig
from .grid import Grid
from .masked import Masked
from .net import Facts, Parts
from .reader import Reader, Window
from .schedules import Block
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
    ):
        """input_ids: [B, P]; real: [B, P] bool, what is not padding."""
        check_blocks(config, facts)
        quirks = config.quirks
        length = config.block_length or facts.block_length
        self.grid = Grid(
            real, config.gen_length, length, at=quirks.grid_from, whole=not quirks.short_last
        )
        self.steps = config.steps
        super().__init__(config, net, facts, input_ids, real, draws)

    def _canvas(self, input_ids: Tensor, facts: Facts) -> Canvas:
        filler = 0 if facts.eos_id is None else facts.eos_id
        more = dict(length=self.grid.length, stop=self.grid.stop, filler=filler)
        canvas = Canvas(input_ids, self.config.gen_length, facts.mask_id, **more)
        if self.quirks.blocks:  # whose results are whole blocks
            canvas.width = self.grid.length
        return canvas

    def _reader(self, net: Parts, facts: Facts, real: Tensor) -> Reader:
        return BlockReader(net, facts, self.config, self.grid, self.canvas.fixed)

    def blocks(self) -> Iterable[Block]:
        """Those that hold a mask when their turn comes. A row shares its steps among the blocks that
        it has masks in."""
        steps = share_of_steps(self.config, self.grid, self.canvas.masked)
        return self._blocks(steps)

    def _blocks(self, steps: Tensor | None) -> Iterable[Block]:
        for number in range(self.grid.number):
            ones = self.canvas.at_start.clamp(1, 1)
            block = self.grid.block(number, self.canvas.masked, ones if steps is None else steps)
            if steps is None:  # one for each mask
                block = block._replace(steps=block.count.clamp_min(1))
            if self.canvas.has_masks(block, self.reader.forwards):
                yield block
            if self.over():
                return

    def begin(self, block: Block) -> None:
        super().begin(block)
        self.reader.forget()  # later blocks read tokens
        self.halted = False
        self.reader.store(self.canvas.ids, block.number * self.grid.b)

    def _window(self, block: Block, index: int) -> Window:
        return self.reader.block_window(block)

    def more(self, block: Block, index: int) -> bool:
        return super().more(block, index) and not self.halted

    def step(self, block: Block, index: int) -> dict:
        told = super().step(block, index)
        if self.config.early_stop and self.quirks.stops_inside and self.end_ids:
            self.halted = self._halts(block, told["committed"])
        return told

    def _halts(self, block: Block, committed: Tensor) -> bool:
        """Does the block end with this step, though masks are left?"""
        canvas = self.canvas
        is_end = torch.isin(canvas.ids, canvas.ids.new_tensor(self.end_ids))
        if self.quirks.stops_inside == "block":
            return bool((is_end & block.inside).any())
        before = is_end.cumsum(-1) == 0
        whole = ~(canvas.masked & before).any(-1) & is_end.any(-1)
        return bool(((committed & is_end).any(-1) & whole).any())

    def end(self, block: Block) -> None:
        if self.quirks.stores_last:
            self.reader.forget()
            self.reader.store(self.canvas.ids, (block.number + 1) * self.grid.b)
        if self.config.early_stop is not False and self.end_ids and self.quirks.stop == "rows":
            self.canvas.stop(block.end, self.end_ids)

    def over(self) -> bool:
        """Does the whole batch end here, with masks left behind? The public samplers have it so."""
        if self.quirks.stop not in ("any", "all") or not self.end_ids:
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
    if config.cache in ("prefix", "dual"):
        raise ValueError(
            f"cache={config.cache!r} is approximate, and a block-causal model has an exact one: leave it out, or "
            f"cache='off'"
        )


def share_of_steps(config: DenoiseConfig, grid: Grid, masked: Tensor) -> Tensor | None:
    """[B] steps of each block; None where each mask has one."""
    if config.steps is None:
        return None
    b = grid.b
    there = [(masked & grid.inside(n * b, (n + 1) * b)).any(1) for n in range(grid.number)]
    blocks = sum(one.long() for one in there).clamp_min(1)
    if short := (config.steps < blocks).nonzero()[:, 0].tolist():
        most = int(blocks.max())
        raise ValueError(
            f"steps={config.steps} cannot be shared by the {most} blocks of rows {short}: give at least {most}"
        )
    return config.steps // blocks
