"""The public samplers of block-causal models, defects included, as substitutions in the loop's places
(`parity.Quirks`).

Shapes: B rows, L columns of the canvas.
"""

import torch
from torch import Tensor

from .quirks import Quirks
from .schedules import Block, Rule, Step, share_out, surest
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
    # LLaDA2.0's own generate, and dllm's LLaDA2Sampler at ca176752
    "llada2": Quirks(rule=rounds, blocks=True, stop="any", stops_inside="gapless"),
    "llada2_dllm": Quirks(rule=rounds, blocks=True, stop="never", stops_inside="block"),
}
