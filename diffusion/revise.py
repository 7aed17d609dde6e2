"""Rules that take their time: they look at decoded tokens again, or commit nothing until the model's
beliefs have settled.

Shapes: B rows, L columns of the canvas.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .rules import Block, Rule, Step
from .select import Belief, Draws, best, divergence, mk_selector


class PathPlanning:
    """Of all positions that are not the caller's, the `left(index)` [B] lowest-scored are masks
    after the step, whether they were decoded or not; what the others hold stands, or commits."""

    def __init__(
        self, left: Callable[[int], Tensor], score: Callable[[Step], Tensor] = lambda s: s.score
    ):
        self.left, self.score = left, score

    def more(self, index: int, left: bool) -> bool:
        return left

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        among = step.open | step.decoded
        stands = self.stands(self.score(step), among, self.left(step.index))
        return step.open & stands, step.decoded & ~stands

    def stands(self, score: Tensor, among: Tensor, left: Tensor) -> Tensor:
        return best(score, among, among.sum(-1) - left)


def p2(block: Block, config, draws: Draws, *, eta: float = 1.0) -> Rule:
    """Path planning (P2, arXiv:2502.03540, self-planning): after step i of S, floor(n (S - i) / S)
    of n positions are masks, those with the lowest score, a standing token's being that of the new
    proposal in its place. eta multiplies that score, of a probability its logarithm: above 1 more
    is masked again, and at 0 nothing."""
    if eta != 1 and config.alg_temp:
        raise ValueError(
            f"schedule_args eta={eta} weighs scores, which alg_temp={config.alg_temp} makes a draw: leave one out"
        )

    def left(i: int) -> Tensor:
        return block.count * (block.steps - 1 - i).clamp_min(0) // block.steps.clamp_min(1)

    selector = mk_selector(config.select)
    takes_log = selector.is_probability or selector.is_random

    def weighed(step: Step) -> Tensor:
        score = step.score.clamp_min(1e-30).log() if takes_log else step.score
        return torch.where(step.decoded, eta * score, score)

    return PathPlanning(left) if eta == 1 else PathPlanning(left, weighed)


class Wino:
    """Commit what is at least `threshold` sure, and the best in any case; then mask again what was
    decoded before and is less than `back` sure by now. With the best alone nothing is masked, and
    never as many as the step before committed, so that each step gains at least one."""

    def __init__(self, threshold: float, back: float):
        self.threshold, self.back = threshold, back
        self.gained: Tensor | None = None  # [B] that the last step committed

    def more(self, index: int, left: bool) -> bool:
        return left

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        first = best(step.score, step.open, step.open.any(-1).long())
        commit = first | (step.open & (step.score >= self.threshold))
        gained = commit.sum(-1)
        asked = step.standing > -torch.inf  # of a row that waits nothing is known
        doubted = step.decoded & asked & (step.standing < self.back)
        most = torch.zeros_like(gained) if self.gained is None else self.gained - 1
        most = torch.where(gained > 1, most.clamp_min(0), 0)
        self.gained = gained
        return commit, best(-step.standing, doubted, most)


class Edit:
    """Another rule for masks; and what is decoded gives way to a new proposal that is surer than
    `above`, also when no mask is left, until that changes nothing or has been tried `most` times."""

    def __init__(self, rule: Rule, count: Tensor, above: float, most: int):
        """count: [B] masks when the block begins."""
        self.rule, self.above, self.most = rule, above, most
        self.busy = count > 0
        self.tried = torch.zeros_like(count)

    def more(self, index: int, left: bool) -> bool:
        return self.rule.more(index, left) if left else bool(self.busy.any())

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        commit, _ = self.rule(step)
        edited = step.decoded & step.differs & (step.prob > self.above)
        full = ~step.open.any(-1)
        self.tried = self.tried + full
        settled = (full & ~edited.any(-1)) | (self.tried >= self.most)
        self.busy = (step.open & ~commit).any(-1) | ~settled
        return commit | edited, None


class Overwrite:
    """Masks commit from the left, up to the first that is less than `threshold` sure, and one in any
    case; what is decoded takes the new proposal, whatever it is. A row ends when all of its block is
    `sure`, or nothing has changed, but with no mask left; in its last step all masks commit."""

    def __init__(self, count: Tensor, steps: Tensor, threshold: float, sure: float):
        """count, steps: [B] masks when the block begins, and forwards for it."""
        self.steps, self.threshold, self.sure = steps, threshold, sure
        self.busy = count > 0

    def more(self, index: int, left: bool) -> bool:
        return left or bool(self.busy.any())

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        is_last = step.index >= self.steps - 1
        unsure = step.open & (step.score < self.threshold) & ~is_last[:, None]
        first = step.open.cumsum(-1) == 1
        promoted = step.open & (first | (unsure.cumsum(-1) == 0))
        written = (promoted | step.decoded) & step.differs
        doubted = (step.open | step.decoded) & (step.prob < self.sure)
        has_masks = (step.open & ~promoted).any(-1)
        self.busy = self.goes_on(has_masks, doubted.any(-1), written.any(-1)) & ~is_last
        return written, None

    def goes_on(self, has_masks: Tensor, doubts: Tensor, changed: Tensor) -> Tensor:
        """All [B] bool, of this step."""
        return has_masks | (doubts & changed)


def overwrite(block: Block, config, draws: Draws, *, sure: float = 0.9) -> Rule:
    """DMax's soft parallel decoding (arXiv:2604.08302, section 3.3), which reads what is decoded
    softly: masks commit from the left while they are `threshold` sure, without one all at once, and
    all decoded tokens of the block are proposed anew in each forward, until every one is `sure` or
    none changes. Takes at most `steps` forwards, without them as many as there are masks. Which
    tokens stay is as by "edit"."""
    return Overwrite(block.count, block.steps, config.threshold or 0.0, sure)


class Refine:
    """Another rule, held back in each row until the mean change of the beliefs about its open
    positions is below `kl`, or for `most` forwards."""

    def __init__(self, rule: Rule, kl: float, most: int):
        self.rule, self.kl, self.most = rule, kl, most
        self.held: Tensor | None = None  # [B] bool

    def more(self, index: int, left: bool) -> bool:
        return self.rule.more(index, left)

    def __call__(self, step: Step) -> tuple[Tensor, Tensor | None]:
        if self.held is None:
            self.held = step.open.any(-1)
        if step.index >= self.most:
            self.held = torch.zeros_like(self.held)
        elif step.index:  # there is nothing to compare the first one with
            total = step.change().masked_fill(~step.open, 0.0).sum(-1)
            self.held = self.held & (total >= self.kl * step.open.sum(-1))
        commit, drop = self.rule(step)
        return commit & ~self.held[:, None], drop


class Recall:
    """The beliefs of the step before, about n positions (rows, cols)."""

    def __init__(self):
        self.last: tuple[Tensor, Tensor, Belief] | None = None

    def replace(
        self, rows: Tensor, cols: Tensor, belief: Belief, shape: torch.Size
    ) -> Callable[[], Tensor]:
        """Keep these -> how far they are from those that were kept, as `Step.change` [B, L]."""
        before, self.last = self.last, (rows, cols, belief)

        def change() -> Tensor:
            out = belief.logits.new_full(shape, torch.inf)
            if before is None:
                return out
            then, number = before[2], torch.arange(len(before[0]), device=rows.device)
            place = torch.full(shape, -1, device=rows.device).index_put(before[:2], number)
            place = place[rows, cols]
            both = place >= 0
            moved = divergence(Belief(belief.logits[both]), Belief(then.logits[place[both]]))
            return out.index_put((rows[both], cols[both]), moved)

        return change
