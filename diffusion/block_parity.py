"""The public samplers of block-causal models, defects included, as substitutions in the loop's places
(`parity.Quirks`).

Shapes: B rows, L columns of the canvas.
"""

import torch
from torch import Tensor

from .grid import Grid
from .quirks import Quirks
from .revise import Edit, Overwrite
from .rules import Block, Rule, Step
from .schedules import Dynamic, Schedule, share_out, surest
from .select import Draws


class Rounds:
    """A whole block's tokens shared over so many rounds, whatever is masked in it; above a threshold
    more of them."""

    def __init__(self, length: int, rounds: int, threshold: float | None):
        self.length, self.rounds, self.threshold = length, rounds, threshold

    def more(self, index: int, left: bool) -> bool:
        return left and index < self.rounds

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        whole = step.open.new_full(step.open.shape[:1], self.length, dtype=torch.long)
        due = share_out(whole, self.rounds, step.index)
        return surest(step, due, self.threshold), None


def rounds(block: Block, config, draws: Draws) -> Rule:
    return Rounds(block.end - block.start, int(block.steps.max()), config.threshold)


class FastGrid(Grid):
    """Fast-dLLM v2's: so many whole blocks from the one in which the longest prompt ends, and one
    token more. A block of one number is decoded in all rows at once, though it be a row's prompt.
    Where the shortest prompt is one block, nobody reads the first."""

    def __init__(self, real: Tensor, gen_length: int, b: int):
        self.b, P = b, real.shape[1]
        length = real.sum(1)
        shortest, longest = length.min(), int(length.max())
        blocks = gen_length // b + longest // b
        if gen_length < b:
            raise ValueError(
                f"gen_length={gen_length} is no block, of which parity makes whole ones: give at least {b}"
            )
        unread = int(shortest == b)
        self.begin = P - length + unread * b
        self.origin, self.stop = self.begin, P - length + blocks * b + 1
        self.first, self.number, self.is_whole = 0, blocks + 1 - unread, False
        self.own = (self.number - 1) * b
        self.length = int(self.stop.max())
        is_later = length // b > shortest // b  # than the first block that is decoded
        # Then the token behind a prompt of whole blocks is written only where no prompt is longer,
        # by more than one, and a longest prompt's first token of a block is written over.
        self.unsaid = is_later & (length % b == 0) & (longest > length + 1)
        self.lost = is_later & (length % b == 1) & (length == longest)
        self.answer = P

    @property
    def alone(self) -> Tensor:
        column = torch.arange(self.length, device=self.origin.device)
        return super().alone | (self.unsaid[:, None] & (column == self.answer))


def last_tokens(grid: FastGrid, width: int) -> Tensor:
    """[B, P] bool, the last tokens of prompts that lose them."""
    return grid.lost[:, None] & (torch.arange(width, device=grid.lost.device) == width - 1)


# forwards of a block; where the mask is proposed again and again the original has no end
ENDLESS = 400


class Bounded(Dynamic):
    def more(self, index: int, left: bool) -> bool:
        return left and index < ENDLESS


def above(block: Block, config, draws: Draws) -> Rule:
    """All that is surer than the threshold, the best in any case."""
    return Bounded(torch.ones_like(block.count), 1, config.threshold)


def llada21(
    block: Block,
    config,
    draws: Draws,
    *,
    editing_threshold: float = 0.9,
    max_post_steps: int = 16,
    num_to_transfer: int = 1,
) -> Rule:
    masks = Rounds(num_to_transfer * ENDLESS, ENDLESS, config.threshold)
    return Edit(masks, block.count, editing_threshold, max_post_steps)


class DMax(Overwrite):
    """All rows of a batch go on or stop together, and may leave masks."""

    def __init__(self, block: Block, threshold: float, sure: float):
        self.most = block.end - block.start
        super().__init__(block.count, block.steps.clamp_min(self.most + 1), threshold, sure)

    def more(self, index: int, left: bool) -> bool:
        return index < self.most and bool(self.busy.any())

    def goes_on(self, has_masks: Tensor, doubts: Tensor, changed: Tensor) -> Tensor:
        return (doubts.any() & changed.any()).expand_as(doubts)


def dmax(block: Block, config, draws: Draws, *, sure: float = 0.9) -> Rule:
    return DMax(block, config.threshold or 0.0, sure)


OF_FAST_V2 = dict(  # what both loops of Fast-dLLM v2 do
    rule=above,
    blocks=True,
    proposes_mask=True,
    filtered_score=True,
    mk_grid=FastGrid,
    first_from_store=True,
    whole_for_first=True,
    is_patient=True,
)
BLOCK_PARITY: dict[str, Quirks] = {
    # JetAstra/SDAR's generate.py at c2041a83, and its copy in the evaluation harness
    "sdar": Quirks(
        rule=rounds,
        blocks=True,
        proposes_mask=True,
        filtered_score=True,
        noise="block",
        stores_last=True,
        stop="any",
    ),
    # Fast-dLLM v2's generate, as the hub's modelling file has it
    "fast_dllm_v2": Quirks(**OF_FAST_V2, stop="any", stops_inside="answer"),
    # its batch_sample, in NVlabs/Fast-dLLM's v2 folder at 6cf27228
    "fast_dllm_v2_batch": Quirks(**OF_FAST_V2, loses=last_tokens, stores_each=True, stop="filled"),
    # LLaDA2.0's own generate, and dllm's LLaDA2Sampler at ca176752
    "llada2": Quirks(rule=rounds, blocks=True, stop="any", stops_inside="gapless"),
    # LLaDA2.1's own generate, as dllm carries it at ca176752
    "llada21": Quirks(
        rule=Schedule(llada21, revises=True, outlasts=True),
        blocks=True,
        is_patient=True,
        stop="any",
    ),
    # czg1225/DMax's dInfer at 82bc29e; with soften="soft-decoded" and rescale="norm"
    "dmax": Quirks(rule=Schedule(dmax, revises=True, outlasts=True), blocks=True, joins=True),
    "llada2_dllm": Quirks(rule=rounds, blocks=True, stop="never", stops_inside="block"),
}
