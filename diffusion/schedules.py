"""How many of a block's open positions commit in each forward, and which.

A schedule is a function `fn(block, config, draws) -> Rule`, called when a block begins. The rule is
then asked, forward by forward, whether another one is wanted and which positions commit. "Best" is
by the selector's score.

Shapes: B rows, L columns of the canvas, S steps.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .select import Draws, best


class Block(NamedTuple):
    """A stretch of the canvas that is decoded before what is right of it."""

    start: int
    end: int
    count: Tensor  # [B] int64 masks in it when it begins
    steps: Tensor  # [B] int64 forwards that a schedule which shares tokens out has for it


class Step(NamedTuple):
    """What a rule decides with."""

    index: int  # from 0 in each block
    score: Tensor  # [B, L] float32 of the selector, -inf where nothing is open
    open: Tensor  # [B, L] bool, may commit now
    decoded: Tensor  # [B, L] bool, committed earlier in this block
    confidence: Tensor  # [B, L] float32 probability of each decoded token when it was committed


class Rule(Protocol):
    def more(self, index: int, left: bool) -> bool:
        """Is another forward wanted, where `left` says whether the block has masks?"""

    def __call__(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """-> [B, L] bool: commit these; and mask these again (None: nothing)."""


class Quota:
    """A rule from numbers alone: count(index, number open) [B] positions commit, the best ones."""

    def __init__(self, count: Callable[[int, Tensor], Tensor]):
        self.count = count

    def more(self, index: int, left: bool) -> bool:
        return left

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        return best(step.score, step.open, self.count(step.index, step.open.sum(-1))), None


def share_out(count: Tensor, steps: Tensor | int, index: int) -> Tensor:
    """Masks to commit at step `index` when `count` are shared evenly over `steps`, the first steps
    taking the rest (LLaDA's get_num_transfer_tokens): [B], [B] -> [B]. Nothing after the last
    step."""
    steps = torch.as_tensor(steps, device=count.device)
    return torch.where(index < steps, count // steps + (index < count % steps), 0)


def uniform(block: Block, config, draws: Draws) -> Rule:
    """The same number every step (LLaDA, arXiv:2502.09992)."""
    # A forward after the last step is there to commit what is left.
    return Quota(
        lambda i, n: torch.where(i < block.steps - 1, share_out(block.count, block.steps, i), n)
    )


def linear(block: Block, config, draws: Draws) -> Rule:
    """Time from 1 to `eps` in equal steps t -> s: of n masks, floor(n (1 - s / t)); in the last
    step all (Dream, arXiv:2508.15487)."""

    def count(i: int, n: Tensor) -> Tensor:
        due = (
            n * (1 - _time(i + 1, block.steps, config.eps) / _time(i, block.steps, config.eps))
        ).long()
        return torch.where(i < block.steps - 1, due, n)

    return Quota(count)


def pyramid(block: Block, config, draws: Draws) -> Rule:
    """1, 2, 3, ... positions, each number `dilation` times, until the block is full: sqrt(2
    dilation n) forwards."""
    return Quota(lambda i, n: torch.full_like(n, i // config.dilation + 1))


class Threshold:
    """Commit what is at least this sure, and the best in any case (Fast-dLLM, arXiv:2505.22618,
    section 3.3)."""

    def __init__(self, threshold: float):
        self.threshold = threshold

    def more(self, index: int, left: bool) -> bool:
        return left

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        first = best(step.score, step.open, step.open.any(-1).long())
        return first | (step.open & (step.score >= self.threshold)), None


def threshold(block: Block, config, draws: Draws) -> Rule:
    return Threshold(config.threshold)


class Factor:
    """Commit the n surest as long as (n + 1)(1 - c_n) < factor, c_n the n-th confidence, and the
    best in any case (Fast-dLLM, arXiv:2505.22618, section 3.3)."""

    def __init__(self, factor: float):
        self.factor = factor

    def more(self, index: int, left: bool) -> bool:
        return left

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        return best(step.score, step.open, self.accepted(*self.ranked(step))), None

    def ranked(self, step: Step) -> tuple[Tensor, Tensor]:
        """-> confidences of the open positions, largest first [B, L] (then -inf), and their number
        [B]."""
        return step.score.masked_fill(~step.open, -torch.inf).sort(
            dim=-1, descending=True
        ).values, step.open.sum(-1)

    def accepted(self, ranked: Tensor, n: Tensor) -> Tensor:
        rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        passes = ((rank + 1) * (1 - ranked) < self.factor) | (rank == 1)
        return torch.minimum(passes.long().cumprod(-1).sum(-1), n)


def factor(block: Block, config, draws: Draws) -> Rule:
    return Factor(config.factor)


def ancestral(block: Block, config, draws: Draws) -> Rule:
    """Each open position commits by itself with probability 1 - s / t, in the last step all
    (absorbing-state diffusion, arXiv:2406.07524; Dream's origin)."""
    return Remask(block, config, draws, strategy=None, at_random=True)


class Remask:
    """ReMDM (arXiv:2503.00307): decoded tokens are masked again with probability sigma, and so many
    more commit.

    alpha is the share decoded, t -> s one step of S equal ones; sigma_max = min(1, (1 - alpha_s) /
    alpha_t). strategy "cap": min(eta, sigma_max). "rescale": eta sigma_max. "conf": sigma_max,
    shared out by softmax(-confidence) over the decoded. "loop": decode up to alpha_on, then, while
    t_on >= t >= t_off, remask with "cap" at a constant alpha_on, then decode the rest. Positions
    come from the selector; at_random draws each by itself, as the original does.
    """

    def __init__(
        self,
        block: Block,
        config,
        draws: Draws,
        *,
        strategy: str | None,
        at_random: bool = False,
        eta: float = 0.02,
        t_on: float = 0.55,
        t_off: float = 0.05,
        alpha_on: float = 0.9,
    ):
        self.block, self.draws, self.strategy, self.at_random = block, draws, strategy, at_random
        self.eta, self.t_on, self.t_off, self.alpha_on = eta, t_on, t_off, alpha_on
        self.steps = block.steps.where(block.count > 0, 0)

    def more(self, index: int, left: bool) -> bool:
        # Masks may come back, so only the number of steps tells; a block whose last token is in
        # stays full without it.
        return index < int(self.steps.max()) if self.strategy else left

    def alpha(self, index: int) -> Tensor:
        """[B] share decoded when step `index` begins."""
        t = (1 - index / self.block.steps).clamp(0, 1).float()
        if self.strategy != "loop":
            return 1 - t
        rise = self.alpha_on * (1 - t) / (1 - self.t_on)
        rest = self.alpha_on + (1 - self.alpha_on) * (self.t_off - t) / self.t_off
        return torch.where(
            t > self.t_on,
            rise,
            torch.where(t >= self.t_off, torch.full_like(t, self.alpha_on), rest),
        )

    def __call__(self, step: Step) -> tuple[Tensor, Tensor | None]:
        now, then = self.alpha(step.index), self.alpha(step.index + 1)
        n = step.open.sum(-1)
        sigma = (
            torch.zeros_like(step.score) if self.strategy is None else self.sigma(step, now, then)
        )
        sigma = sigma.masked_fill(~step.decoded | (then >= 1)[:, None], 0.0)
        drop = None
        if self.strategy is not None:
            drop = torch.zeros_like(step.open)
            # a row past its steps draws nothing
            may = step.decoded & (step.index < self.steps)[:, None]
            drop[may] = self.draws.at(may) < sigma[may]
        if self.at_random:
            mean = sigma.sum(-1) / step.decoded.sum(-1).clamp_min(1)
            chance = ((then - now + mean * now) / (1 - now).clamp_min(1e-9)).masked_fill(
                then >= 1, 1.0
            )
            commit = torch.zeros_like(step.open)
            commit[step.open] = (
                self.draws.at(step.open) < chance[:, None].expand_as(step.score)[step.open]
            )
            return commit, drop
        goal = torch.round(self.block.count * (1 - then)).long()  # masks that are to be left
        back = 0 if drop is None else drop.sum(-1)
        return best(step.score, step.open, (n + back - goal).clamp_min(0)), drop

    def sigma(self, step: Step, now: Tensor, then: Tensor) -> Tensor:
        """[B, L] chance of each decoded position to be masked again."""
        largest = ((1 - then) / now.clamp_min(1e-9)).clamp_max(1.0)[:, None]
        if self.strategy == "rescale":
            return (self.eta * largest).expand_as(step.score)
        if self.strategy == "conf":
            doubt = (-step.confidence).masked_fill(~step.decoded, -torch.inf)
            return torch.nan_to_num(doubt.softmax(-1)) * largest
        sigma = largest.clamp_max(self.eta)
        if self.strategy == "loop":
            t = 1 - step.index / self.block.steps
            sigma = sigma.masked_fill(((t > self.t_on) | (t < self.t_off))[:, None], 0.0)
        return sigma.expand_as(step.score)


def remask(block: Block, config, draws: Draws) -> Rule:
    at_random = config.select == "random" or config.schedule_name == "ancestral"
    return Remask(
        block, config, draws, strategy=config.remask, at_random=at_random, **config.remask_args
    )


def _time(index: int, steps: Tensor, eps: float) -> Tensor:
    """Point `index` of linspace(1, eps, steps + 1) in float32, for each row: [B] -> [B]."""
    points = [torch.linspace(1, eps, s + 1)[min(index, s)] for s in steps.tolist()]
    return torch.stack(points).to(steps.device)


REMASKS = ("cap", "rescale", "conf", "loop")
SCHEDULES: dict[str, Callable[..., Rule]] = {
    "uniform": uniform,
    "linear": linear,
    "pyramid": pyramid,
    "threshold": threshold,
    "factor": factor,
    "ancestral": ancestral,
}
