"""ReMDM (arXiv:2503.00307): decoded tokens are masked again with probability sigma, and so many
more commit.

A way to remask is a function `fn(step, largest, t, **knobs) -> sigma`, of each position: [B, L], or
what expands to it. A masked one is drawn as if it were masked again with its sigma. largest:
[B, 1] the most that the clock allows, min(1, (1 - alpha_s) / alpha_t), where alpha is the share
decoded and t -> s one step of S equal ones; t: [B].

Shapes: B rows, L columns of the canvas.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from softar.checks import check_choice

from .knobs import check_knobs
from .schedules import Block, Rule, Step, drawn, time_left
from .select import Draws, best, mk_selector


def cap(step: Step, largest: Tensor, t: Tensor, *, eta: float = 0.02) -> Tensor:
    """min(eta, largest)."""
    return largest.clamp_max(eta)


def rescale(step: Step, largest: Tensor, t: Tensor, *, eta: float = 0.02) -> Tensor:
    """eta times largest."""
    return eta * largest


def conf(step: Step, largest: Tensor, t: Tensor) -> Tensor:
    """largest, shared out by softmax(-confidence) over the decoded; 0 at masks. So with positions
    drawn at random fewer are decoded than the clock says, as in the paper; where the selector
    chooses them, the clock is kept."""
    doubt = (-step.confidence).masked_fill(~step.decoded, -torch.inf)
    return torch.nan_to_num(doubt.softmax(-1)) * largest


def loop(
    step: Step,
    largest: Tensor,
    t: Tensor,
    *,
    eta: float = 0.02,
    t_on: float = 0.55,
    t_off: float = 0.05,
    alpha_on: float = 0.9,
) -> Tensor:
    """Decode up to alpha_on; then, while t_on >= t >= t_off, remask as `cap` does at a constant
    alpha_on; then decode the rest."""
    return largest.clamp_max(eta).masked_fill(((t > t_on) | (t < t_off))[:, None], 0.0)


def even(t: Tensor, **knobs) -> Tensor:
    """Alpha [B] at time t [B]: as many in each step."""
    return 1 - t


def plateau(t: Tensor, *, eta: float, t_on: float, t_off: float, alpha_on: float) -> Tensor:
    """Alpha of `loop`."""
    rise = alpha_on * (1 - t) / (1 - t_on)
    rest = alpha_on + (1 - alpha_on) * (t_off - t) / t_off
    flat = torch.full_like(t, alpha_on)
    alpha = torch.where(t > t_on, rise, torch.where(t >= t_off, flat, rest))
    return alpha.masked_fill(t <= 0, 1.0)  # in the end all of it, with t_off=0 too


class Remasking(NamedTuple):
    """A way to remask, and the share that is decoded meanwhile."""

    fn: Callable[..., Tensor]
    alpha: Callable[..., Tensor] = even  # (t [B], **knobs) -> [B]


class Remask:
    """The rule. Positions come from the selector; at_random draws each by itself, as the original
    does."""

    def __init__(
        self, block: Block, draws: Draws, remasking: Remasking, knobs: dict, *, at_random: bool
    ):
        self.block, self.draws, self.at_random = block, draws, at_random
        self.remasking = remasking
        self.knobs = (remasking.fn.__kwdefaults__ or {}) | knobs
        self.steps = block.steps.where(block.count > 0, 0)
        self.last = int(self.steps.max())

    def more(self, index: int, left: bool) -> bool:
        # Masks may come back, so only the number of steps tells; a block whose last token is in
        # stays full without it.
        return index < self.last

    def alpha(self, index: int) -> Tensor:
        """[B] share decoded when step `index` begins."""
        return self.remasking.alpha(time_left(index, self.block.steps), **self.knobs)

    def sigma(self, step: Step, now: Tensor, then: Tensor) -> Tensor:
        """[B, L] chance of each position to be masked again, or to stay masked for that."""
        largest = ((1 - then) / now.clamp_min(1e-9)).clamp_max(1.0)[:, None]
        t = time_left(step.index, self.block.steps)
        sigma = self.remasking.fn(step, largest, t, **self.knobs).expand_as(step.score)
        return sigma.masked_fill((then >= 1)[:, None], 0.0)

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        now, then = self.alpha(step.index), self.alpha(step.index + 1)
        sigma = self.sigma(step, now, then)
        drop = torch.zeros_like(step.open)
        # a row past its steps draws nothing
        may = step.decoded & (step.index < self.steps)[:, None]
        drop[may] = self.draws.at(may) < sigma[may]
        if self.at_random:
            return drawn(step.open, now, then, self.draws, back=sigma), drop
        goal = torch.round(self.block.count * (1 - then)).long()  # masks that are to be left
        count = (step.open.sum(-1) + drop.sum(-1) - goal).clamp_min(0)
        return best(step.score, step.open, count), drop


def remask(block: Block, config, draws: Draws) -> Rule:
    at_random = mk_selector(config.select).is_random or config.scheduler.is_random
    return Remask(block, draws, REMASKS[config.remask], config.remask_args, at_random=at_random)


def check_remask(name: str, knobs: dict) -> None:
    """Raise ValueError for a way to remask that is unknown, or knobs that it does not take."""
    check_choice("remask", name, REMASKS)
    takes = REMASKS[name].fn.__kwdefaults__ or {}
    check_knobs("remask", name, knobs, takes, RANGES)
    t_on, t_off = ((takes | knobs).get(knob, 0) for knob in ("t_on", "t_off"))
    if t_off > t_on:
        raise ValueError(
            f"remask_args t_off={t_off} must be at most t_on={t_on}: time runs from 1 to 0"
        )


RANGES = dict.fromkeys(
    ("eta", "t_on", "t_off", "alpha_on"), (lambda x: 0 <= x <= 1, "must lie in [0, 1]")
)
# the schedules beside it: as many in each step, or drawn
REMASKED = ("uniform", "ancestral")
REMASKS: dict[str, Remasking] = {
    "cap": Remasking(cap),
    "rescale": Remasking(rescale),
    "conf": Remasking(conf),
    "loop": Remasking(loop, alpha=plateau),
}
